"""S3-FIFO: three queues, no reordering on use.

After Yang, Zhang, Qiu, Yue and Rashmi, "FIFO queues are all you need for cache eviction",
SOSP 2023.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from flashmoe.bank.policy.contract import Policy, nothing_to_evict

SMALL_SHARE = 0.1
MOST_USES = 3
USES_TO_STAY = 2


class S3FIFO(Policy):
    """Experts come into a small queue and leave it soon unless they were used again there.

    `small_share` of the capacity is the small queue's size before the main queue is spared.
    An expert that was used `uses_to_stay` times since it came into the small queue moves on to
    the main one; the others are evicted, and remembered in a queue of ghosts, as many as there
    are slots in the main queue. A ghost that returns comes into the main queue at once. The main
    queue gives an expert one more round for each use, `MOST_USES` at most. Pinned experts go to
    the back of their queue.
    """

    def __init__(
        self, capacity: int, small_share: float = SMALL_SHARE, uses_to_stay: int = USES_TO_STAY
    ) -> None:
        super().__init__(capacity)
        self._small_share = small_share
        self._size_queues()
        self._uses_to_stay = uses_to_stay
        # Uses since admission by expert, oldest first.
        self._small: OrderedDict[int, int] = OrderedDict()
        self._main: OrderedDict[int, int] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()

    def resize(self, capacity: int) -> None:
        super().resize(capacity)
        self._size_queues()
        while len(self._ghosts) > self._most_ghosts:
            self._ghosts.popitem(last=False)

    def use(self, expert: int) -> None:
        if expert in self._main:
            self._main[expert] = min(self._main[expert] + 1, MOST_USES)
        elif expert in self._small:
            self._small[expert] = min(self._small[expert] + 1, MOST_USES)
        elif expert in self._ghosts:
            del self._ghosts[expert]
            self._main[expert] = 0
        else:
            self._small[expert] = 0

    def victim(self, pinned: Collection[int]) -> int:
        expert = None
        if len(self._small) >= self._small_size:
            expert = self._evict_small(pinned)
        if expert is None:
            expert = self._evict_main(pinned)
        if expert is None:
            expert = self._evict_small(pinned)
        if expert is None:
            # The small queue has just moved on all that was not pinned.
            expert = self._evict_main(pinned)
        if expert is None:
            raise nothing_to_evict()
        return expert

    def forget(self, expert: int) -> None:
        del (self._main if expert in self._main else self._small)[expert]

    def __contains__(self, expert: int) -> bool:
        return expert in self._small or expert in self._main

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def _size_queues(self) -> None:
        self._small_size = max(1, int(self.capacity * self._small_share))
        self._most_ghosts = max(1, self.capacity - self._small_size)

    def _evict_small(self, pinned: Collection[int]) -> int | None:
        for _ in range(len(self._small)):
            expert, uses = self._small.popitem(last=False)
            if expert in pinned:
                self._small[expert] = uses
            elif uses >= self._uses_to_stay:
                self._main[expert] = 0
            else:
                self._ghosts[expert] = None
                if len(self._ghosts) > self._most_ghosts:
                    self._ghosts.popitem(last=False)
                return expert
        return None

    def _evict_main(self, pinned: Collection[int]) -> int | None:
        for _ in range((MOST_USES + 1) * len(self._main)):
            expert, uses = self._main.popitem(last=False)
            if expert in pinned:
                self._main[expert] = uses
            elif uses > 0:
                self._main[expert] = uses - 1
            else:
                return expert
        return None
