"""What `flashmoe tune` measures: reading alone first, then the model with a few settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flashmoe.base import machine
from flashmoe.base.errors import OptionError
from flashmoe.base.units import format_size
from flashmoe.bench.tune_model import RunRow, TunedModel, tune_model
from flashmoe.engine.options import Options
from flashmoe.probe.read_tuning import ReadRow, TunedReads, tune_reads
from flashmoe.probe.tuning import Choice, Tuning
from flashmoe.store.reader import Store, open_store

# With what starting takes, and a last measurement that began in time, under a minute.
DEFAULT_SECONDS = 50.0
LEAST_SECONDS, MOST_SECONDS = 1.0, 3600.0
# Of all the time, what goes to reading alone.
READ_SHARE = 0.25
# A model whose resident weights take more than this of the time that is left is not loaded.
LOAD_SHARE = 0.5

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TuneReport:
    """What was measured in `seconds`, what it means (`tuning`), and sentences that qualify it."""

    store: str
    machine: machine.Machine
    seconds: float
    reads: tuple[ReadRow, ...]
    runs: tuple[RunRow, ...]
    notes: tuple[str, ...]
    tuning: Tuning

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def tune(
    folder: str | Path,
    *,
    memory: str | int | None = None,
    seconds: float = DEFAULT_SECONDS,
    progress: Progress = lambda done, total: None,
) -> TuneReport:
    """Measure for about `seconds` what is fastest for a store here; nothing is stored.

    `memory` is that of the models that run, as in `Options`. `progress(done, total)` counts
    seconds. Raises StoreError when `folder` is no store, OptionError for values that cannot be,
    ReadError when records cannot be read.
    """
    Options(memory=memory)
    if not LEAST_SECONDS <= seconds <= MOST_SECONDS:
        raise OptionError(
            f"tuning takes {LEAST_SECONDS:.0f} to {MOST_SECONDS:.0f} seconds, not {seconds:g}"
        )
    store = open_store(folder)
    started = time.perf_counter()

    def tick() -> None:
        progress(min(int(time.perf_counter() - started), int(seconds)), int(seconds))

    free_bytes = machine.usable_memory_bytes()
    reads = tune_reads(store, seconds * READ_SHARE, tick=tick)
    left = seconds - (time.perf_counter() - started)
    tuned = _tune_model(store, reads, memory, left, free_bytes, tick)
    progress(int(seconds), int(seconds))
    page_cache = _reads_through_page_cache(tuned, reads, store, free_bytes)
    return TuneReport(
        store=str(folder),
        machine=machine.describe(store.path),
        seconds=time.perf_counter() - started,
        reads=reads.rows,
        runs=tuned.rows,
        notes=(*reads.notes, *tuned.notes),
        tuning=Tuning(
            choice=tuned.choice,
            bytes_per_second=reads.rate(page_cache, "decode"),
            tokens_per_second=tuned.tokens_per_second,
            when=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
    )


def _tune_model(
    store: Store,
    reads: TunedReads,
    memory: str | int | None,
    seconds: float,
    free_bytes: int,
    tick: Callable[[], None],
) -> TunedModel:
    resident_bytes = sum(shard.tensor_bytes for shard in store.manifest.resident)
    rate = max(row.bytes_per_second for row in reads.rows if row.pattern == "prefill")
    if resident_bytes / rate > seconds * LOAD_SHARE:
        choice = Choice(reads.cached, reads.uncached or Choice().uncached)
        note = (
            f"loading {format_size(resident_bytes)} of resident weights would take "
            f"{resident_bytes / rate:.0f} of the {max(seconds, 0):.0f} seconds left: bank, page "
            "cache and prefetch were not tuned; give more --seconds"
        )
        return TunedModel(choice, None, (), (note,))
    return tune_model(store, reads, memory, seconds, free_bytes=free_bytes, tick=tick)


def _reads_through_page_cache(
    tuned: TunedModel, reads: TunedReads, store: Store, free_bytes: int
) -> bool:
    """Whether records will be read through the page cache with what was chosen."""
    chosen = next((row.page_cache for row in tuned.rows if row.is_chosen), None)
    if chosen is not None:
        return chosen
    return reads.uncached is None or store.manifest.streamed_bytes <= free_bytes
