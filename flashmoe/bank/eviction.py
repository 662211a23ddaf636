"""Which resident record gives way when a slot is needed. Knows record numbers, no memory."""

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
    """Keeps the records of one bank in an order of eviction.

    The bank tells it of every use; a record that it does not know is thereby admitted. The
    bank asks for a victim when it has no free slot. The same calls in the same order always give
    the same victims. Every operation is cheap, because there is one per record access: O(1),
    except that `victim` also passes over the pinned records in its way, and what it sets aside
    for later it has been paid for by earlier uses.
    """

    def __init__(self, capacity: int) -> None:
        """`capacity` is the number of slots, at least 1; the bank admits no more records."""
        self.capacity = _checked(capacity)

    def resize(self, capacity: int) -> None:
        """Note that the bank now has another number of slots, at least 1.

        Who is resident stays: a bank that shrinks takes its victims before. Raises ValueError
        for fewer slots than resident records.
        """
        if capacity < len(self):
            raise ValueError(f"{len(self)} records are resident, more than {capacity} slots")
        self.capacity = _checked(capacity)

    @abstractmethod
    def use(self, record: int) -> None:
        """Note that a record is being used; an unknown one has just been brought in."""

    @abstractmethod
    def victim(self, pinned: Collection[int]) -> int:
        """The record to evict, none of `pinned`; it is no longer resident.

        Raises LookupError, and evicts nothing, when every resident record is pinned. `pinned`
        should answer `in` in O(1).
        """

    @abstractmethod
    def forget(self, record: int) -> None:
        """Note that a resident record has lost its slot without having been a victim.

        Raises KeyError when it is not resident.
        """

    def ranked(self) -> list[int]:
        """The resident records, those that would be evicted last first."""
        left = copy.deepcopy(self)
        order = [left.victim(()) for _ in range(len(left))]
        return order[::-1]

    @abstractmethod
    def __contains__(self, record: int) -> bool:
        """Whether this record counts as resident."""

    @abstractmethod
    def __len__(self) -> int:
        """How many records count as resident."""


class LFU(Policy):
    """Evicts the record with the lowest score, the sum of its uses, each halved in weight after
    every `half_life` times capacity uses of any record.

    A short half-life makes it an LRU, an endless one counts uses. Scores outlive eviction: an
    record that is brought in again has the score it would have had. A victim takes O(log n)
    for each record that was used since it was last looked at.
    """

    def __init__(self, capacity: int, half_life: float = HALF_LIFE) -> None:
        super().__init__(capacity)
        self._half_life = half_life
        self._growth = self._growth_at(capacity)
        self._weight = 1.0
        self._scores: dict[int, float] = {}
        self._resident: set[int] = set()
        # One entry for each resident record, its score when it was put there: scores only grow,
        # so the true one is never lower.
        self._heap: list[tuple[float, int]] = []

    def resize(self, capacity: int) -> None:
        super().resize(capacity)
        self._growth = self._growth_at(capacity)

    def use(self, record: int) -> None:
        score = self._scores.get(record, 0.0) + self._weight
        self._scores[record] = score
        if record not in self._resident:
            self._resident.add(record)
            heappush(self._heap, (score, record))
        self._weight *= self._growth
        if self._weight > LARGEST_WEIGHT:
            self._rescale()

    def victim(self, pinned: Collection[int]) -> int:
        passed = []
        found = None
        while self._heap and found is None:
            entry = heappop(self._heap)
            score, record = entry
            if self._scores[record] > score:
                heappush(self._heap, (self._scores[record], record))
            elif record in pinned:
                passed.append(entry)
            else:
                found = record
        for entry in passed:
            heappush(self._heap, entry)
        if found is None:
            raise _nothing_to_evict()
        self._resident.remove(found)
        return found

    def forget(self, record: int) -> None:
        self._resident.remove(record)
        self._heap = [entry for entry in self._heap if entry[1] != record]
        heapify(self._heap)

    def __contains__(self, record: int) -> bool:
        return record in self._resident

    def __len__(self) -> int:
        return len(self._resident)

    def _growth_at(self, capacity: int) -> float:
        """By what the weight of a use exceeds that of the use before it."""
        growth: float = 2.0 ** (1.0 / (self._half_life * capacity))
        return growth

    def _rescale(self) -> None:
        scale = 1.0 / self._weight
        self._scores = {record: score * scale for record, score in self._scores.items()}
        self._heap = [(self._scores[record], record) for _, record in self._heap]
        heapify(self._heap)
        self._weight = 1.0


class LRU(Policy):
    """Evicts the record that was used longest ago."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order: OrderedDict[int, None] = OrderedDict()

    def use(self, record: int) -> None:
        self._order[record] = None
        self._order.move_to_end(record)

    def victim(self, pinned: Collection[int]) -> int:
        record = next((used for used in self._order if used not in pinned), None)
        if record is None:
            raise _nothing_to_evict()
        del self._order[record]
        return record

    def forget(self, record: int) -> None:
        del self._order[record]

    def __contains__(self, record: int) -> bool:
        return record in self._order

    def __len__(self) -> int:
        return len(self._order)


def _checked(capacity: int) -> int:
    if capacity < 1:
        raise ValueError(f"a policy needs at least 1 slot, not {capacity}")
    return capacity


def _nothing_to_evict() -> LookupError:
    """The error for a bank whose records are all pinned."""
    return LookupError("every resident record is pinned")
