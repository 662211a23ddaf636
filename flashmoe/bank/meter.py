"""What a model's layers count while they run, and the clock that they share."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Self

from flashmoe.base.clock import PhaseClock


@dataclass
class Counters:
    """Records that layers asked for, and what became of that.

    An access is one distinct expert needed by one layer call: a `hit` when its record is in
    the bank, else a `miss`. `bytes_demanded` counts the record bytes of all accesses,
    `bytes_read` those that came from disk, and `bytes_absent` what of the demand was in memory
    for no earlier demand: misses, and what was prefetched for this one.

    `prefetched` counts the records that were read before a layer needed them, `prefetched_used`
    those that a layer then needed before they were evicted, and `not_prefetched` the records that
    decoding needed, missed and had not prefetched; records too small to prefetch do not count.
    `bytes_wasted` counts the bytes that were prefetched, read and evicted without being needed.

    `warm_started` counts the records that a warm start read, `warm_started_used` those that were
    needed while they were in the bank.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_demanded: int = 0
    bytes_absent: int = 0
    prefetched: int = 0
    prefetched_used: int = 0
    not_prefetched: int = 0
    bytes_wasted: int = 0
    warm_started: int = 0
    warm_started_used: int = 0

    def counts(self) -> tuple[int, ...]:
        """All counts, in the order of the fields above."""
        return tuple(getattr(self, name) for name in COUNTS)

    def add(self, before: tuple[int, ...], after: tuple[int, ...]) -> Self:
        """Count what was counted between two `counts()` here, too."""
        for name, old, new in zip(COUNTS, before, after, strict=True):
            setattr(self, name, getattr(self, name) + new - old)
        return self

    @property
    def hit_rate(self) -> float:
        """Hits per access, 0 when there was none."""
        accesses = self.hits + self.misses
        return self.hits / accesses if accesses else 0.0

    @property
    def prefetch_precision(self) -> float | None:
        """The share of the prefetched records that were needed; None when there was none."""
        return self.prefetched_used / self.prefetched if self.prefetched else None

    @property
    def prefetch_recall(self) -> float | None:
        """The share of the records that decoding needed from disk that had been prefetched; None
        when it needed none."""
        needed = self.prefetched_used + self.not_prefetched
        return self.prefetched_used / needed if needed else None


COUNTS = tuple(f.name for f in fields(Counters))


@dataclass(frozen=True)
class Meter:
    """One model's counters and clock, shared by its layers."""

    counters: Counters = field(default_factory=Counters)
    clock: PhaseClock = field(default_factory=PhaseClock)
