"""Replaying accesses: the best possible by brute force, LRU curves, and slots by need."""

import itertools
import random
from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.bank.policy.lfu import LFU
from flashmoe.bank.policy.lru import LRU
from flashmoe.bank.policy.select import POLICY_NAMES, make_policy
from flashmoe.base.errors import MemoryBudgetError
from flashmoe.bench.belady import belady_hits
from flashmoe.bench.replay import replay
from flashmoe.memory.budget import LayerDemand, share_slots
from flashmoe.memory.hit_curves import lfu_hit_curve, lru_hit_curve, share_by_need

N_EXPERTS = 6
STEP = st.sets(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=3).map(sorted)


def brute_force_hits(steps: list[list[int]], capacity: int) -> int:
    """The most hits over all choices of victims, every miss being brought in."""

    @cache
    def best(now: int, resident: frozenset[int]) -> int:
        if now == len(steps):
            return 0
        step = frozenset(steps[now])
        surplus = len(resident | step) - capacity
        choices = itertools.combinations(sorted(resident - step), max(surplus, 0))
        kept = (best(now + 1, (resident | step).difference(victims)) for victims in choices)
        return len(resident & step) + max(kept)

    return best(0, frozenset())


@given(st.lists(STEP, max_size=9), st.integers(3, 5))
def test_belady_is_the_best_of_all_choices(steps: list[list[int]], capacity: int) -> None:
    assert belady_hits(steps, capacity) == brute_force_hits(steps, capacity)


def test_belady_by_hand() -> None:
    # Two slots, one expert at a time: 1 gives way to 2, 2 to 3, and 0 stays throughout.
    assert belady_hits([[0], [1], [0], [2], [0], [3], [0]], 2) == 3
    # The step's own experts are never victims, though 0 is needed at once and 1 never.
    assert belady_hits([[0], [1, 2], [0]], 2) == 0
    assert belady_hits([], 2) == 0


def popular_steps(seed: int, n_steps: int = 400) -> list[list[int]]:
    """Some experts far more often than others, and other ones from the middle on."""
    draw = random.Random(seed)
    steps = []
    for number in range(n_steps):
        turn = 5 if number > n_steps // 2 else 0
        chosen = {(int(16 * draw.random() ** 2) + turn) % 16 for _ in range(3)}
        steps.append(sorted(chosen))
    return steps


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("capacity", [3, 6, 12, 16])
def test_no_policy_beats_belady(name: str, capacity: int) -> None:
    steps = popular_steps(1)
    hits = replay(steps, make_policy(name, capacity))
    best = belady_hits(steps, capacity)
    if capacity == 16:
        # Everything stays: only first uses miss.
        assert hits == best == sum(map(len, steps)) - 16
    else:
        assert 0 < hits <= best
        assert hits < best or capacity == 3


@given(st.lists(STEP, max_size=40))
def test_lru_curve_is_what_replaying_gives(steps: list[list[int]]) -> None:
    curve = lru_hit_curve(steps, N_EXPERTS)
    assert curve.shape == (N_EXPERTS + 1,)
    for capacity in range(3, N_EXPERTS + 1):
        assert curve[capacity] == replay(steps, LRU(capacity))


def test_lru_curve_by_hand() -> None:
    assert lru_hit_curve([[0], [0], [1], [0], [2], [1]], 4).tolist() == [0, 1, 2, 3, 3]


def test_lfu_curve_counts_uses() -> None:
    steps = popular_steps(2)
    counts = sorted(Counter(itertools.chain(*steps)).values(), reverse=True)
    curve = lfu_hit_curve(steps, 20)
    assert curve.tolist() == [sum(counts[:n]) for n in range(21)]


def test_lfu_curve_is_about_what_replaying_gives() -> None:
    draw = random.Random(3)
    steps = [sorted({int(32 * draw.random() ** 3) for _ in range(2)}) for _ in range(3000)]
    total = sum(map(len, steps))
    for capacity in (4, 8, 16, 24):
        about = lfu_hit_curve(steps, 32)[capacity] / total
        assert abs(replay(steps, LFU(capacity)) / total - about) < 0.12


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
