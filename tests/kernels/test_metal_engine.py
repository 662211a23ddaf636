"""Whole models through the Metal kernels, run by the harness: budget-independent, and close to
the reference."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import flashmoe
from flashmoe import FlashMoEModel
from flashmoe.kernels import metal
from flashmoe.kernels.check_verdicts import PASSED, Verdicts
from tests.support.families import save_checkpoint
from tests.support.metal_on_cpu import compiled
from tests.support.metals import harness, row_error, wide

PROMPT = [(7 * i + 3) % 101 for i in range(20)]
ANSWER = [5, 90]


def logits(store: Path, kernel: str, cache: str) -> list[mx.array]:
    """Of a prompt, and of tokens decoded after it."""
    with FlashMoEModel.from_pretrained(store, kernel=kernel, cache=cache) as model:
        kept = make_prompt_cache(model.model)
        outputs = [model.model(mx.array([PROMPT]), cache=kept)]
        outputs += [model.model(mx.array([[token]]), cache=kept) for token in ANSWER]
        mx.eval(outputs)
        model.check_integrity()
    return outputs


# Gated; clipped with expert biases; without a gate.
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@compiled
def test_models(family: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metal, "available", lambda: None)
    save_checkpoint(tmp_path / "checkpoint", family)
    store = flashmoe.repack(tmp_path / "checkpoint", tmp_path / "store").path
    expected = logits(store, "reference", "1GB")
    launched = []
    with harness():
        run = metal._run
        monkeypatch.setattr(metal, "_run", lambda *args: launched.append(args[0]) or run(*args))
        small, large = (logits(store, "metal", cache) for cache in ("min", "1GB"))
    assert {launch.kernel.name for launch in launched} == {"expert_gate_up", "expert_down"}
    for found, at_most, exact in zip(small, large, expected, strict=True):
        assert mx.array_equal(found, at_most)
        assert row_error(wide(found), wide(exact)) < 1e-5
    # Checked on first use, and remembered.
    verdicts = Verdicts(home / ".cache" / "flashmoe" / "kernel-checks.json")._found
    assert set(verdicts.values()) == {PASSED}
    assert all(key.startswith("metal ") for key in verdicts)
    assert np.isfinite(wide(small[-1])).all()
