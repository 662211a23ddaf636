"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from flashmoe.bank.policy.contract import Policy, first_unpinned, nothing_to_evict


class LRU(Policy):
    """Evicts the expert that was used longest ago."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order: OrderedDict[int, None] = OrderedDict()

    def use(self, expert: int) -> None:
        self._order[expert] = None
        self._order.move_to_end(expert)

    def victim(self, pinned: Collection[int]) -> int:
        expert = first_unpinned(self._order, pinned)
        if expert is None:
            raise nothing_to_evict()
        del self._order[expert]
        return expert

    def forget(self, expert: int) -> None:
        del self._order[expert]

    def __contains__(self, expert: int) -> bool:
        return expert in self._order

    def __len__(self) -> int:
        return len(self._order)
