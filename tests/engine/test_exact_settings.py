"""No setting of the engine, no disk and no order of reads changes a bit of what a model says."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.exact_settings import CHOICES, Setting, Trials, logits

TAKEN = (
    "ExpertPrefill.__call__",
    "LayerBank._evict",
    "LayerBank.adopt",
    "LayerBank.resize",
    "StreamedExperts._run_overlapped",
    "StreamedExperts._run_grouped",
    "prefetches begun",
    "prefetches cancelled",
    "right predictions",
    "bytes wasted",
)


def test_logits_are_byte_equal_under_any_setting(tmp_path_factory: pytest.TempPathFactory) -> None:
    drawn: list[Setting] = []

    @settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
    @given(st.builds(Setting, **{name: st.sampled_from(c) for name, c in CHOICES.items()}))
    def check(setting: Setting) -> None:
        drawn.append(setting)
        with trials.model(setting) as model:
            assert list(logits(model, setting)) == trials.expected(setting)

    with Trials(tmp_path_factory.mktemp("exact")) as trials:
        check()
        hits = trials.hits
    # What the settings are about did happen.
    assert {setting.family for setting in drawn} == set(CHOICES["family"])
    assert all(hits[way] > 0 for way in TAKEN), hits
