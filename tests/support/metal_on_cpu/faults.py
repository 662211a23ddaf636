"""What can be wrong with a kernel."""

from __future__ import annotations


class KernelFault(Exception):
    """A kernel did what Metal forbids or leaves undefined; the text says what, and where.

    `kind` is one of: out of bounds, misaligned access, input written, output not written,
    output race, unwritten output, unwritten threadgroup memory, threadgroup race,
    threadgroup memory, barrier divergence, SIMD divergence, SIMD lane, shift, division,
    crash, endless.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class CompileFault(KernelFault):
    """The kernel's source is not valid."""

    def __init__(self, text: str) -> None:
        super().__init__("compilation", text)
