"""Which resident expert gives way when a slot is needed. Knows expert numbers, no memory."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection
from heapq import heapify, heappop, heappush

HALF_LIFE = 8.0
# Weights grow instead of scores shrinking; at this one everything is scaled down.
LARGEST_WEIGHT = 1e100


class Policy(ABC):
    """Keeps the experts of one bank in an order of eviction.

    The bank tells it of every use; an expert that it does not know is thereby admitted. The
    bank asks for a victim when it has no free slot. The same calls in the same order always give
    the same victims. Every operation is cheap, because there is one per expert access: O(1),
    except that `victim` also passes over the pinned experts in its way, and what it sets aside
    for later it has been paid for by earlier uses.
    """

    def __init__(self, capacity: int) -> None:
        """`capacity` is the number of slots, at least 1; the bank admits no more experts."""
        self.capacity = _checked(capacity)

    def resize(self, capacity: int) -> None:
        """Note that the bank now has another number of slots, at least 1.

        Who is resident stays: a bank that shrinks takes its victims before. Raises ValueError
        for fewer slots than resident experts.
        """
        if capacity < len(self):
            raise ValueError(f"{len(self)} experts are resident, more than {capacity} slots")
        self.capacity = _checked(capacity)

    @abstractmethod
    def use(self, expert: int) -> None:
        """Note that an expert is being used; an unknown one has just been brought in."""

    @abstractmethod
    def victim(self, pinned: Collection[int]) -> int:
        """The expert to evict, none of `pinned`; it is no longer resident.

        Raises LookupError, and evicts nothing, when every resident expert is pinned. `pinned`
        should answer `in` in O(1).
        """

    @abstractmethod
    def forget(self, expert: int) -> None:
        """Note that a resident expert has lost its slot without having been a victim.

        Raises KeyError when it is not resident.
        """

    def ranked(self) -> list[int]:
        """The resident experts, those that would be evicted last first."""
        left = copy.deepcopy(self)
        order = [left.victim(()) for _ in range(len(left))]
        return order[::-1]

    @abstractmethod
    def __contains__(self, expert: int) -> bool:
        """Whether this expert counts as resident."""

    @abstractmethod
    def __len__(self) -> int:
        """How many experts count as resident."""


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
            raise _nothing_to_evict()
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


class LRU(Policy):
    """Evicts the expert that was used longest ago."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order: OrderedDict[int, None] = OrderedDict()

    def use(self, expert: int) -> None:
        self._order[expert] = None
        self._order.move_to_end(expert)

    def victim(self, pinned: Collection[int]) -> int:
        expert = next((used for used in self._order if used not in pinned), None)
        if expert is None:
            raise _nothing_to_evict()
        del self._order[expert]
        return expert

    def forget(self, expert: int) -> None:
        del self._order[expert]

    def __contains__(self, expert: int) -> bool:
        return expert in self._order

    def __len__(self) -> int:
        return len(self._order)


def _checked(capacity: int) -> int:
    if capacity < 1:
        raise ValueError(f"a policy needs at least 1 slot, not {capacity}")
    return capacity


def _nothing_to_evict() -> LookupError:
    """The error for a bank whose experts are all pinned."""
    return LookupError("every resident expert is pinned")
