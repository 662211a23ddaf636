"""The arithmetic of `bench decode`."""

from __future__ import annotations

import math

import pytest

from flashmoe.bench.pass_figures import Spread, overlap, pass_figures, spread
from tests.support.passes import made_pass


def test_spread() -> None:
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
    assert spread([float(i) for i in range(11)]) == Spread(5.0, 1.0, 9.0)


@pytest.mark.parametrize(
    ("compute", "read", "wall", "expected"),
    [
        (3.0, 1.0, 4.0, 0.0),  # one after the other
        (3.0, 1.0, 3.0, 1.0),  # reading is hidden
        (1.0, 3.0, 3.0, 1.0),  # computing is
        (2.0, 2.0, 3.0, 0.5),
        (2.0, 2.0, 5.0, -0.5),
        (2.0, 0.0, 2.0, None),
        (2.0, 0.01, 2.5, None),  # of noise alone
    ],
)
def test_overlap(compute: float, read: float, wall: float, expected: float | None) -> None:
    assert overlap(compute, read, wall) == expected


def test_figures() -> None:
    figures = pass_figures(made_pass(), 1e9)
    assert figures.tokens == 4
    assert figures.tokens_per_second.median == pytest.approx(10)
    assert figures.tokens_per_second.p10 == pytest.approx(7.667, abs=1e-3)
    assert figures.tokens_per_second.p90 == pytest.approx(17)
    assert figures.prefill_tokens_per_second.median == pytest.approx(15)
    assert figures.first_token_seconds.median == pytest.approx(2)
    assert figures.hit_rate == 0.75
    assert figures.kept_rate == 0.75
    assert figures.bytes_read_per_token == 40e6
    assert figures.read_of_absent == pytest.approx(4 / 3)
    assert figures.bytes_per_second == pytest.approx(0.4e9)
    assert figures.share_of_disk == pytest.approx(0.4)
    assert figures.token_seconds == pytest.approx(0.1)
    phases = {"computing": 0.05, "experts": 0.02, "reading": 0.025, "host": 0.005}
    assert figures.phases == pytest.approx(phases)
    assert figures.host_share == pytest.approx(0.05)
    assert figures.compute_seconds == 0.08
    assert figures.read_seconds == pytest.approx(0.04)
    assert figures.overlap == pytest.approx((0.08 + 0.04 - 0.1) / 0.04)
    assert figures.waiting_of_disk == pytest.approx(0.025 / 0.03)


def test_figures_that_nothing_was_measured_for() -> None:
    decode = {**made_pass().decode, "bytes_read": 0, "bytes_absent": 0}
    figures = pass_figures(made_pass(decode=decode, computing_seconds=[]), 1e9)
    assert figures.compute_seconds is None
    assert figures.overlap is None
    assert figures.read_of_absent is None
    assert figures.waiting_of_disk is None
    assert figures.read_seconds == 0
    assert not math.isnan(figures.share_of_disk)
