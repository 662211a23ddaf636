"""Segmented LRU: what was used twice is kept apart from what was used once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from flashmoe.bank.policy.contract import Policy, first_unpinned, nothing_to_evict

PROTECTED_SHARE = 0.9


class SLRU(Policy):
    """Two LRU lists: experts come in on probation and are protected from their second use on.

    At most `protected_share` of the capacity is protected; what falls out of there is on
    probation again, as the most recent. Victims come from probation while there are any.
    """

    def __init__(self, capacity: int, protected_share: float = PROTECTED_SHARE) -> None:
        super().__init__(capacity)
        self._protected_share = protected_share
        self._most_protected = int(capacity * protected_share)
        self._probation: OrderedDict[int, None] = OrderedDict()
        self._protected: OrderedDict[int, None] = OrderedDict()

    def resize(self, capacity: int) -> None:
        super().resize(capacity)
        self._most_protected = int(capacity * self._protected_share)
        self._let_fall()

    def use(self, expert: int) -> None:
        if expert in self._protected:
            self._protected.move_to_end(expert)
        elif expert in self._probation:
            del self._probation[expert]
            self._protected[expert] = None
            self._let_fall()
        else:
            self._probation[expert] = None

    def victim(self, pinned: Collection[int]) -> int:
        for segment in (self._probation, self._protected):
            expert = first_unpinned(segment, pinned)
            if expert is not None:
                del segment[expert]
                return expert
        raise nothing_to_evict()

    def forget(self, expert: int) -> None:
        del (self._protected if expert in self._protected else self._probation)[expert]

    def _let_fall(self) -> None:
        while len(self._protected) > self._most_protected:
            fallen, _ = self._protected.popitem(last=False)
            self._probation[fallen] = None

    def __contains__(self, expert: int) -> bool:
        return expert in self._probation or expert in self._protected

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)
