"""Counts and times of a streaming model; one object per model, shared by its layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from flashmoe.base.clock import PhaseClock, Phases


@dataclass
class Seconds:
    """Wall-clock seconds of generation.

    `prefill` and `decode` are what they took from begin to end; `in_prefill` and `in_decode`
    say by phase where that went. Calls of the model outside of a session count in the latter.
    """

    prefill: float = 0.0
    decode: float = 0.0
    in_prefill: Phases = field(default_factory=Phases)
    in_decode: Phases = field(default_factory=Phases)

    @property
    def phases(self) -> Phases:
        """Prefill and decode together."""
        return self.in_prefill + self.in_decode

    @property
    def computing(self) -> float:
        return self.phases.computing

    @property
    def reading(self) -> float:
        return self.phases.reading

    @property
    def experts(self) -> float:
        return self.phases.experts

    @property
    def host(self) -> float:
        return self.phases.host

    def copy(self) -> Seconds:
        return replace(self, in_prefill=replace(self.in_prefill), in_decode=replace(self.in_decode))

    def since(self, earlier: Seconds) -> Seconds:
        return Seconds(
            prefill=self.prefill - earlier.prefill,
            decode=self.decode - earlier.decode,
            in_prefill=self.in_prefill - earlier.in_prefill,
            in_decode=self.in_decode - earlier.in_decode,
        )


@dataclass
class Stats:
    """Totals since the model was loaded.

    An access is one distinct expert needed by one layer call: a `hit` when its record is in
    the bank, else a `miss`. `bytes_demanded` counts the record bytes of all accesses,
    `bytes_read` those that came from disk, and `bytes_absent` what of the demand was in memory
    for no earlier demand: misses, and what was read ahead for this one. `tokens` counts
    generated tokens.

    `prefetched` counts the records that were read before a layer needed them, `prefetched_used`
    those that a layer then needed before they were evicted, and `not_prefetched` the records that
    decoding needed, missed and had not prefetched; records too small to prefetch do not count.
    `bytes_wasted` counts the bytes that were prefetched, read and evicted without being needed.

    `warm_started` counts the records that a warm start read, `warm_started_used` those that were
    needed while they were in the bank.

    `after_layer` is called when a layer's routed experts are done. `clock` is what counts into
    `seconds`.
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
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: Seconds = field(default_factory=Seconds)
    clock: PhaseClock = field(default_factory=PhaseClock, repr=False, compare=False)
    after_layer: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.clock.totals = self.seconds.in_decode

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

    @contextmanager
    def generating(self, part: Literal["prefill", "decode"]) -> Iterator[None]:
        """Time the block as this part; what no phase of its own claims is the host's."""
        seconds = self.seconds
        self.clock.totals = seconds.in_prefill if part == "prefill" else seconds.in_decode
        started = time.perf_counter()
        try:
            with self.clock.during("host"):
                yield
        finally:
            setattr(seconds, part, getattr(seconds, part) + time.perf_counter() - started)
            self.clock.totals = seconds.in_decode

    def copy(self) -> Stats:
        return replace(self, seconds=self.seconds.copy(), clock=PhaseClock(), after_layer=None)

    def since(self, earlier: Stats) -> Stats:
        """What happened after `earlier` was copied."""
        counts = {
            f.name: getattr(self, f.name) - getattr(earlier, f.name)
            for f in fields(Stats)
            if isinstance(getattr(self, f.name), int)
        }
        return Stats(**counts, seconds=self.seconds.since(earlier.seconds))
