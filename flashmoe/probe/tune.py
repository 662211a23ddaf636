"""What `flashmoe tune` measures: how a store's records are read fastest."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flashmoe.base import machine
from flashmoe.base.errors import OptionError
from flashmoe.base.progress import Progress
from flashmoe.probe.read_tuning import ReadRow, tune_reads
from flashmoe.probe.tuning import Choice, Reads, Tuning
from flashmoe.store.reader import open_store

DEFAULT_SECONDS = 15.0
LEAST_SECONDS, MOST_SECONDS = 1.0, 3600.0


@dataclass(frozen=True)
class TuneReport:
    """What was measured in `seconds`, what it means (`tuning`), and sentences that qualify it."""

    store: str
    machine: machine.Machine
    seconds: float
    reads: tuple[ReadRow, ...]
    notes: tuple[str, ...]
    tuning: Tuning

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def tune(
    folder: str | Path,
    *,
    seconds: float = DEFAULT_SECONDS,
    progress: Progress = lambda done, total: None,
) -> TuneReport:
    """Measure for about `seconds` how a store is read fastest here; nothing is stored.

    `progress(done, total)` counts seconds. Raises StoreError when `folder` is no store,
    OptionError for seconds out of range, ReadError when records cannot be read.
    """
    if not LEAST_SECONDS <= seconds <= MOST_SECONDS:
        raise OptionError(
            f"tuning takes {LEAST_SECONDS:.0f} to {MOST_SECONDS:.0f} seconds, not {seconds:g}"
        )
    store = open_store(folder)
    started = time.perf_counter()

    def tick() -> None:
        progress(min(int(time.perf_counter() - started), int(seconds)), int(seconds))

    free_bytes = machine.usable_memory_bytes()
    reads = tune_reads(store, seconds, tick=tick)
    progress(int(seconds), int(seconds))
    # What is likely to be read through, where nobody says.
    page_cache = reads.uncached is None or store.manifest.streamed_bytes <= free_bytes
    return TuneReport(
        store=str(folder),
        machine=machine.describe(store.path),
        seconds=time.perf_counter() - started,
        reads=reads.rows,
        notes=reads.notes,
        tuning=Tuning(
            choice=Choice(reads.cached, reads.uncached or Reads()),
            bytes_per_second=reads.rate(page_cache, "decode"),
            when=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
    )
