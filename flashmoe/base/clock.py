"""Where the time of a token goes: a clock that is in one phase at any moment while it runs.

Knows nothing about what the phases are spent on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from types import TracebackType
from typing import Literal

Phase = Literal["computing", "reading", "experts", "host"]


@dataclass
class Phases:
    """Wall-clock seconds by phase.

    `computing` is waiting for MLX and for native products of resident weights: attention,
    routers, shared experts, output layer. `reading` is waiting for records, `experts` is in the
    kernels of routed experts (lazy ones only begin there, and are waited for in `computing`),
    and `host` is everything else, Python above all.
    """

    computing: float = 0.0
    reading: float = 0.0
    experts: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.computing + self.reading + self.experts + self.host

    def __add__(self, other: Phases) -> Phases:
        return Phases(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __iadd__(self, other: Phases) -> Phases:
        self.computing += other.computing
        self.reading += other.reading
        self.experts += other.experts
        self.host += other.host
        return self

    def __sub__(self, other: Phases) -> Phases:
        return Phases(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


class PhaseClock:
    """Adds the time between two switches to the phase it was in; stopped, it is in none."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.totals = Phases()
        self._clock = clock
        self._phase: Phase | None = None
        self._since = 0.0

    def switch(self, phase: Phase | None) -> Phase | None:
        """Be in `phase` from now on, None stops the clock; returns the phase before."""
        now = self._clock()
        before = self._phase
        if before is not None:
            totals = self.totals
            setattr(totals, before, getattr(totals, before) + now - self._since)
        self._phase, self._since = phase, now
        return before

    def during(self, phase: Phase) -> Span:
        """`with clock.during(phase):` be in it, and afterwards in the phase before."""
        return Span(self, phase)


class Span:
    """What `PhaseClock.during` gives; for one `with` block."""

    __slots__ = ("_before", "_clock", "_phase")

    def __init__(self, clock: PhaseClock, phase: Phase) -> None:
        self._clock = clock
        self._phase: Phase = phase
        self._before: Phase | None = None

    def __enter__(self) -> None:
        self._before = self._clock.switch(self._phase)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._clock.switch(self._before)
