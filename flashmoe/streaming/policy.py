"""Which resident expert gives way when a slot is needed."""

from __future__ import annotations

from collections.abc import Collection


class LRU:
    """Evicts the expert that was used longest ago; every operation is O(1) amortised."""

    def __init__(self) -> None:
        self._order: dict[int, None] = {}

    def use(self, expert: int) -> None:
        """Note that a resident (or just admitted) expert is being used."""
        self._order.pop(expert, None)
        self._order[expert] = None

    def forget(self, expert: int) -> None:
        """Note that an expert is not resident any more, if it ever was."""
        self._order.pop(expert, None)

    def victim(self, pinned: Collection[int]) -> int:
        """The expert to evict, none of `pinned`; it is forgotten.

        Raises LookupError when every known expert is pinned.
        """
        for expert in self._order:
            if expert not in pinned:
                del self._order[expert]
                return expert
        raise LookupError("every resident expert is pinned")
