"""What a bank asks of an eviction policy."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection


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


def _checked(capacity: int) -> int:
    if capacity < 1:
        raise ValueError(f"a policy needs at least 1 slot, not {capacity}")
    return capacity


def nothing_to_evict() -> LookupError:
    """The error for a bank whose experts are all pinned."""
    return LookupError("every resident expert is pinned")


def first_unpinned(experts: Collection[int], pinned: Collection[int]) -> int | None:
    """The first of `experts` that is not pinned, or None."""
    return next((expert for expert in experts if expert not in pinned), None)
