"""The best that any eviction could have done, knowing the future."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush


def belady_hits(steps: Sequence[Sequence[int]], capacity: int) -> int:
    """Hits of the optimal policy over `steps`, each the distinct experts of one call.

    As in a bank, all experts of a step have slots during the step, so every miss is brought in
    and none of them gives way to another. Evicting the expert that is needed again last is
    optimal (Belady, "A study of replacement algorithms", 1966). `capacity` is at least the
    longest step's length.
    """
    next_uses = _next_uses(steps)
    resident: set[int] = set()
    # (-next use, expert), noted at every use. What an expert was noted with before lies in the
    # past, and what the running step needs is noted with now: neither comes up while there is a
    # resident expert that the step does not need.
    farthest: list[tuple[int, int]] = []
    hits = 0
    for now, step in enumerate(steps):
        missing = sum(expert not in resident for expert in step)
        hits += len(step) - missing
        for _ in range(len(resident) + missing - capacity):
            resident.remove(heappop(farthest)[1])
        resident.update(step)
        for expert, when in zip(step, next_uses[now], strict=True):
            heappush(farthest, (-when, expert))
    return hits


def _next_uses(steps: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each expert of each step, the next step that needs it, len(steps) for none."""
    upcoming: dict[int, int] = {}
    found: list[list[int]] = []
    for now in range(len(steps) - 1, -1, -1):
        found.append([upcoming.get(expert, len(steps)) for expert in steps[now]])
        upcoming.update(dict.fromkeys(steps[now], now))
    found.reverse()
    return found
