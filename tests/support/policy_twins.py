"""Slow, readable twins of the eviction policies: plain lists, everything searched for."""

from collections.abc import Collection

from flashmoe.bank.eviction import HALF_LIFE, LFU, LRU


class Twin:
    """The history of all uses, and who is resident."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.history: list[int] = []
        # The capacity at each use.
        self.capacities: list[int] = []
        self.resident: list[int] = []

    def use(self, expert: int) -> None:
        self.history.append(expert)
        self.capacities.append(self.capacity)
        if expert not in self.resident:
            self.resident.append(expert)

    def victim(self, pinned: Collection[int]) -> int:
        expert = self.choose(pinned)
        assert expert not in pinned
        self.resident.remove(expert)
        return expert

    def resize(self, capacity: int) -> None:
        self.capacity = capacity

    def choose(self, pinned: Collection[int]) -> int:
        raise NotImplementedError


class LRUTwin(Twin):
    def choose(self, pinned: Collection[int]) -> int:
        def last_use(expert: int) -> int:
            return max(when for when, used in enumerate(self.history) if used == expert)

        return min((e for e in self.resident if e not in pinned), key=last_use)


class LFUTwin(Twin):
    """Scores summed up anew over the whole history."""

    def score(self, expert: int) -> float:
        used = [when for when, e in enumerate(self.history) if e == expert]
        # A use ages all uses up to it by a share of the half-life at that time.
        ages = [sum(1 / (HALF_LIFE * c) for c in self.capacities[when:]) for when in used]
        return sum(2.0**-age for age in ages)

    def choose(self, pinned: Collection[int]) -> int:
        return min((e for e in self.resident if e not in pinned), key=lambda e: (self.score(e), e))


TWINS = {LFU: LFUTwin, LRU: LRUTwin}
