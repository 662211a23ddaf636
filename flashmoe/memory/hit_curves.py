"""Which layer needs slots most, measured from the experts it was asked for. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from flashmoe.memory.budget import LayerDemand, share_slots

HitCurve = npt.NDArray[np.int64]


def use_hit_curve(uses: npt.NDArray[np.int64]) -> HitCurve:
    """About what a bank that keeps the most used experts hits, for every number of slots at once.

    `uses` [n_experts] is how often each expert was used. Returns [n_experts + 1] int64: entry c is
    the uses of the c experts that were used most, what c slots would hit if they held just these.
    """
    return np.concatenate([[0], np.cumsum(np.sort(uses)[::-1])])


def share_by_need(
    curves: Sequence[HitCurve], demands: Sequence[LayerDemand], bank_bytes: int
) -> tuple[int, ...]:
    """Slots per layer within `bank_bytes`, where they bring most hits by the layers' curves.

    `curves[i]` has layer i's hits for each number of slots up to `demands[i].most`. Slots go
    where the steepest rise is left, looking ahead over flat stretches (the curves' upper convex
    hulls); the result is never worse by the curves than equal counts. Every layer has at least
    `least`. What is maximised is bytes that need not be read.

    Raises MemoryBudgetError when the bytes do not cover one token's needs.
    """
    equal = share_slots(demands, bank_bytes)
    slots = [demand.least for demand in demands]
    left = bank_bytes - sum(n * d.slot_bytes for n, d in zip(slots, demands, strict=True))
    rises = [
        (-rise, i, count)
        for i, (curve, demand) in enumerate(zip(curves, demands, strict=True))
        for rise, count in _hull(curve, demand.least, demand.most)
    ]
    for _, i, count in sorted(rises):
        more = min(count - slots[i], left // demands[i].slot_bytes)
        slots[i] += more
        left -= more * demands[i].slot_bytes
    return max(tuple(slots), equal, key=lambda counts: _bytes_hit(curves, demands, counts))


def _hull(curve: HitCurve, least: int, most: int) -> list[tuple[float, int]]:
    """The upper convex hull of a curve as (hits per slot, up to this many slots)."""
    corners = [least]
    for count in range(least + 1, most + 1):
        while len(corners) > 1 and _slope(curve, corners[-1], count) >= _slope(
            curve, corners[-2], corners[-1]
        ):
            corners.pop()
        corners.append(count)
    return [(_slope(curve, first, second), second) for first, second in pairwise(corners)]


def _slope(curve: HitCurve, first: int, second: int) -> float:
    return float(curve[second] - curve[first]) / (second - first)


def _bytes_hit(
    curves: Sequence[HitCurve], demands: Sequence[LayerDemand], slots: Sequence[int]
) -> int:
    return sum(
        int(curve[count]) * demand.slot_bytes
        for curve, demand, count in zip(curves, demands, slots, strict=True)
    )
