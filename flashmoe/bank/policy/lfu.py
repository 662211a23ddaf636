"""Least frequently used, where old uses count less and less."""

from __future__ import annotations

from collections.abc import Collection
from heapq import heapify, heappop, heappush

from flashmoe.bank.policy.contract import Policy, nothing_to_evict

HALF_LIFE = 8.0
# Weights grow instead of scores shrinking; at this one everything is scaled down.
LARGEST_WEIGHT = 1e100


class LFU(Policy):
    """Evicts the expert with the lowest score, the sum of its uses, each halved in weight after
    every `half_life` times capacity uses of any expert.

    A short half-life makes it an LRU, an endless one counts uses. Scores outlive eviction: an
    expert that is brought in again has the score it would have had. A victim takes O(log n)
    for each expert that was used since it was last looked at.
    """

    def __init__(self, capacity: int, half_life: float = HALF_LIFE) -> None:
        super().__init__(capacity)
        self._half_life = half_life
        self._growth = self._growth_at(capacity)
        self._weight = 1.0
        self._scores: dict[int, float] = {}
        self._resident: set[int] = set()
        # One entry for each resident expert, its score when it was put there: scores only grow,
        # so the true one is never lower.
        self._heap: list[tuple[float, int]] = []

    def resize(self, capacity: int) -> None:
        super().resize(capacity)
        self._growth = self._growth_at(capacity)

    def use(self, expert: int) -> None:
        score = self._scores.get(expert, 0.0) + self._weight
        self._scores[expert] = score
        if expert not in self._resident:
            self._resident.add(expert)
            heappush(self._heap, (score, expert))
        self._weight *= self._growth
        if self._weight > LARGEST_WEIGHT:
            self._rescale()

    def victim(self, pinned: Collection[int]) -> int:
        passed = []
        found = None
        while self._heap and found is None:
            entry = heappop(self._heap)
            score, expert = entry
            if self._scores[expert] > score:
                heappush(self._heap, (self._scores[expert], expert))
            elif expert in pinned:
                passed.append(entry)
            else:
                found = expert
        for entry in passed:
            heappush(self._heap, entry)
        if found is None:
            raise nothing_to_evict()
        self._resident.remove(found)
        return found

    def forget(self, expert: int) -> None:
        self._resident.remove(expert)
        self._heap = [entry for entry in self._heap if entry[1] != expert]
        heapify(self._heap)

    def __contains__(self, expert: int) -> bool:
        return expert in self._resident

    def __len__(self) -> int:
        return len(self._resident)

    def _growth_at(self, capacity: int) -> float:
        """By what the weight of a use exceeds that of the use before it."""
        growth: float = 2.0 ** (1.0 / (self._half_life * capacity))
        return growth

    def _rescale(self) -> None:
        scale = 1.0 / self._weight
        self._scores = {expert: score * scale for expert, score in self._scores.items()}
        self._heap = [(self._scores[expert], expert) for _, expert in self._heap]
        heapify(self._heap)
        self._weight = 1.0
