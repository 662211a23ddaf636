"""Slots by need: where they bring most hits, by the layers' curves."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.base.errors import MemoryBudgetError
from flashmoe.memory.budget import LayerDemand, share_slots
from flashmoe.memory.hit_curves import share_by_need, use_hit_curve


def test_curve_counts_uses() -> None:
    assert use_hit_curve(np.array([0, 5, 2, 9])).tolist() == [0, 9, 14, 16, 16]


def value(
    curves: list[np.ndarray], demands: list[LayerDemand], slots: tuple[int, ...]
) -> tuple[int, int]:
    """Bytes hit and bytes taken."""
    hit = sum(int(c[n]) * d.slot_bytes for c, d, n in zip(curves, demands, slots, strict=True))
    return hit, sum(d.slot_bytes * n for d, n in zip(demands, slots, strict=True))


RISES = st.lists(st.integers(0, 9), min_size=6, max_size=6)


@given(st.lists(RISES, min_size=2, max_size=3), st.integers(0, 20))
def test_slots_by_need_are_optimal_for_convex_curves(rises: list[list[int]], spare: int) -> None:
    curves = [np.cumsum([0, *sorted(rise, reverse=True)]) for rise in rises]
    demands = [LayerDemand(100, 2, 6) for _ in curves]
    bank_bytes = 100 * (2 * len(curves) + spare) + 99
    slots = share_by_need(curves, demands, bank_bytes)
    hit, taken = value(curves, demands, slots)
    assert taken <= bank_bytes
    assert taken == 100 * min(2 * len(curves) + spare, 6 * len(curves))
    options = itertools.product(range(2, 7), repeat=len(curves))
    values = [value(curves, demands, option) for option in options]
    assert hit == max(hits for hits, size in values if size <= bank_bytes)


@given(st.lists(RISES, min_size=2, max_size=3), st.integers(0, 30), st.integers(1, 3))
def test_slots_by_need_are_never_worse_than_equal_ones(
    rises: list[list[int]], spare: int, factor: int
) -> None:
    curves = [np.cumsum([0, *rise]) for rise in rises]
    demands = [LayerDemand(100 + 50 * factor * i, 1 + i % 2, 6) for i in range(len(curves))]
    least = sum(d.least * d.slot_bytes for d in demands)
    slots = share_by_need(curves, demands, least + 40 * spare)
    hit, taken = value(curves, demands, slots)
    assert taken <= least + 40 * spare
    assert all(d.least <= n <= d.most for d, n in zip(demands, slots, strict=True))
    assert hit >= value(curves, demands, share_slots(demands, least + 40 * spare))[0]


def test_slots_by_need_look_over_flat_stretches() -> None:
    # Layer 0 gains nothing before its sixth slot, and then more than layer 1 ever does.
    cliff, slope = np.array([0, 0, 0, 0, 0, 0, 90]), np.array([0, 0, 0, 1, 2, 3, 4])
    demands = [LayerDemand(100, 2, 6)] * 2
    assert share_by_need([cliff, slope], demands, 800) == (6, 2)


def test_slots_by_need_need_one_token() -> None:
    curve = np.arange(7)
    with pytest.raises(MemoryBudgetError):
        share_by_need([curve, curve], [LayerDemand(100, 2, 6)] * 2, 399)
