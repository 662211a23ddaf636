"""Rows of the source's tensors, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

Apply = Callable[..., mx.array]


@dataclass(frozen=True, slots=True)
class RowNode:
    """Rows `begin` to `end` of a source tensor `leaf`, or what `apply` makes of `inputs`.

    `moves` says that the result has the very bytes of its one input, in their order. `check` is
    given what `apply` is; it looks at values and raises SourceError.
    """

    leaf: str = ""
    begin: int = 0
    end: int = 0
    apply: Apply | None = None
    inputs: tuple[RowNode, ...] = ()
    moves: bool = True
    check: Callable[..., None] | None = None

    def leaves(self) -> Iterator[RowNode]:
        """The source's rows that this needs."""
        if self.leaf:
            yield self
        for step in self.inputs:
            yield from step.leaves()

    @property
    def is_plain(self) -> bool:
        """Whether the result is a range of a source file, byte for byte."""
        if self.leaf:
            return True
        return self.moves and len(self.inputs) == 1 and self.inputs[0].is_plain

    def evaluate(self, read: Callable[[RowNode], mx.array], *, checked: bool = False) -> mx.array:
        """The result; `read` gives the rows of a leaf. `checked` has values looked at, which
        evaluates them."""
        if self.apply is None:
            return read(self)
        inputs = [step.evaluate(read, checked=checked) for step in self.inputs]
        if checked and self.check is not None:
            self.check(*inputs)
        return self.apply(*inputs)
