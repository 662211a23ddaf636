"""First in, first out, with a second chance for what was used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from flashmoe.bank.policy.contract import Policy, nothing_to_evict


class Clock(Policy):
    """CLOCK: a hand goes round the experts in the order they came in.

    It takes away the mark of an expert that was used since the hand last passed, and evicts the
    first one without a mark. Being admitted leaves no mark. The hand passes pinned experts
    without touching their marks.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        # Marks by expert; the hand is at the front, and what it passes goes to the back.
        self._marks: OrderedDict[int, bool] = OrderedDict()

    def use(self, expert: int) -> None:
        self._marks[expert] = expert in self._marks

    def victim(self, pinned: Collection[int]) -> int:
        marks = self._marks
        # After one round the only marks left are those of pinned experts.
        for _ in range(2 * len(marks)):
            expert = next(iter(marks))
            if expert not in pinned:
                if not marks[expert]:
                    del marks[expert]
                    return expert
                marks[expert] = False
            marks.move_to_end(expert)
        raise nothing_to_evict()

    def forget(self, expert: int) -> None:
        del self._marks[expert]

    def __contains__(self, expert: int) -> bool:
        return expert in self._marks

    def __len__(self) -> int:
        return len(self._marks)
