"""Counts and times of a streaming model; one object per model, shared by its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace


@dataclass
class Seconds:
    """Wall-clock seconds by phase.

    `prefill` and `decode` split the time of generation; `reading` (waiting for records),
    `experts` (in the kernels of routed experts; lazy ones only begin there) and `computing`
    (waiting for MLX) are parts of both.
    """

    prefill: float = 0.0
    decode: float = 0.0
    reading: float = 0.0
    experts: float = 0.0
    computing: float = 0.0


@dataclass
class Stats:
    """Totals since the model was loaded.

    An access is one distinct expert needed by one layer call: a `hit` when its record is in
    the bank, else a `miss`. `bytes_demanded` counts the record bytes of all accesses,
    `bytes_read` those that came from disk, and `bytes_absent` what of the demand was in memory
    for no earlier demand: misses, and what was read ahead for this one. `guessed` counts
    records that were read ahead, `guessed_right` those of them that were needed next. `tokens`
    counts generated tokens. `after_layer` is called when a layer's routed experts are done.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_demanded: int = 0
    bytes_absent: int = 0
    guessed: int = 0
    guessed_right: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: Seconds = field(default_factory=Seconds)
    after_layer: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    @property
    def hit_rate(self) -> float:
        """Hits per access, 0 when there was none."""
        accesses = self.hits + self.misses
        return self.hits / accesses if accesses else 0.0

    def copy(self) -> Stats:
        return replace(self, seconds=replace(self.seconds), after_layer=None)

    def since(self, earlier: Stats) -> Stats:
        """What happened after `earlier` was copied."""
        return Stats(
            hits=self.hits - earlier.hits,
            misses=self.misses - earlier.misses,
            bytes_read=self.bytes_read - earlier.bytes_read,
            bytes_demanded=self.bytes_demanded - earlier.bytes_demanded,
            bytes_absent=self.bytes_absent - earlier.bytes_absent,
            guessed=self.guessed - earlier.guessed,
            guessed_right=self.guessed_right - earlier.guessed_right,
            prompt_tokens=self.prompt_tokens - earlier.prompt_tokens,
            tokens=self.tokens - earlier.tokens,
            seconds=Seconds(
                prefill=self.seconds.prefill - earlier.seconds.prefill,
                decode=self.seconds.decode - earlier.seconds.decode,
                experts=self.seconds.experts - earlier.seconds.experts,
                reading=self.seconds.reading - earlier.seconds.reading,
                computing=self.seconds.computing - earlier.seconds.computing,
            ),
        )
