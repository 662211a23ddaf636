"""One measurement of a reader: random records in batches, each complete before the next begins."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from flashmoe import native
from flashmoe.bank.slot_memory import SlotMemory
from flashmoe.io.mapped import MmapReader
from flashmoe.io.native import NativeReader
from flashmoe.io.reader import ReadCounters, Reader, ReadRequest, Scatter
from flashmoe.io.select import resolve_reader
from flashmoe.io.threads import ThreadReader
from flashmoe.probe.record_files import RecordFiles, evict, shuffled_batches

# Far more than the processor's caches hold, as a bank is.
SLOTS_BYTES = 256 * 2**20
NATIVE, PYTHON, MMAP = "native pread", "Python pread", "mmap"

# Batches of records as (path, offset), every record of the files at most once.
Order = Callable[[RecordFiles, int, random.Random], Iterator[list[tuple[Path, int]]]]


@dataclass(frozen=True)
class ReadMeasurement:
    """What a reader did in `elapsed` seconds, the time between batches included."""

    elapsed: float
    counters: ReadCounters

    @property
    def bytes_per_second(self) -> float:
        return self.counters.bytes / self.elapsed


def reader_titles(reader: str | None) -> list[str]:
    """What an option's value stands for; None is every reader there is."""
    first = PYTHON if native.available() else NATIVE
    if reader is None:
        return list(dict.fromkeys([first, PYTHON, MMAP]))
    return [MMAP if resolve_reader(reader) == "mmap" else first]


def open_titled(title: str, threads: int, page_cache: bool) -> Reader:
    """A new reader of that title."""
    if title == MMAP:
        return MmapReader(threads)
    return (NativeReader if title == NATIVE else ThreadReader)(threads, page_cache=page_cache)


class Destinations:
    """Slots that batches of up to `most_batch` records land in, one after the other."""

    def __init__(self, files: RecordFiles, most_batch: int) -> None:
        count = max(most_batch, SLOTS_BYTES // files.record.stride)
        # Widening is work that follows reading, so records land as they are stored.
        self._memory = SlotMemory(files.record, count, 1, widen=False)
        self._scatters = [self._memory.destination(slot, 0) for slot in range(count)]
        self._next = 0

    def take(self, count: int) -> list[Scatter]:
        first, self._next = self._next, self._next + count
        return [self._scatters[i % len(self._scatters)] for i in range(first, self._next)]


def read_for(
    seconds: float,
    files: RecordFiles,
    batch: int,
    opener: Callable[[], Reader],
    destinations: Destinations,
    draw: random.Random,
    *,
    order: Order = shuffled_batches,
    apart: bool = False,
) -> ReadMeasurement:
    """Read batches for that long, random ones by default.

    With `apart` each record is submitted as a batch of its own. The page cache is emptied
    first, and again, the clock stopped, whenever every record has been read. Raises
    ReadError when a record cannot be read.
    """
    elapsed = 0.0
    passes = []
    while elapsed < seconds:
        evict(files.paths)
        # What a reader keeps mapped cannot be evicted: each pass has a reader of its own.
        with closing(opener()) as reader:
            reader.submit([ReadRequest(path, 0, []) for path in files.paths]).wait()
            before = reader.counters
            batches = list(order(files, batch, draw))
            elapsed += _pass(reader, batches, destinations, seconds - elapsed, apart)
            passes.append(_since(reader.counters, before))
    return ReadMeasurement(elapsed, add_counters(passes))


def _pass(
    reader: Reader,
    batches: Sequence[Sequence[tuple[Path, int]]],
    destinations: Destinations,
    seconds: float,
    apart: bool,
) -> float:
    """Read all batches, or as many as fit into `seconds`; returns the seconds it took."""
    started = time.perf_counter()
    for places in batches:
        slots = destinations.take(len(places))
        requests = [
            ReadRequest(path, offset, scatter)
            for (path, offset), scatter in zip(places, slots, strict=True)
        ]
        parts = [[request] for request in requests] if apart else [requests]
        for ticket in [reader.submit(part) for part in parts]:
            ticket.wait()
        if time.perf_counter() - started >= seconds:
            break
    return time.perf_counter() - started


def _since(now: ReadCounters, before: ReadCounters) -> ReadCounters:
    """What was counted after `before`, during which nothing but empty requests was read."""
    return replace(now, reads=now.reads - before.reads)


def add_counters(parts: Sequence[ReadCounters]) -> ReadCounters:
    """Totals over readers that ran one after the other."""
    busy = sum(part.busy_seconds for part in parts)
    depths = sum(part.mean_queue_depth * part.busy_seconds for part in parts)
    return ReadCounters(
        reads=sum(part.reads for part in parts),
        bytes=sum(part.bytes for part in parts),
        seconds=sum(part.seconds for part in parts),
        busy_seconds=busy,
        mean_queue_depth=depths / busy if busy else 0.0,
        minor_faults=sum(part.minor_faults for part in parts),
        major_faults=sum(part.major_faults for part in parts),
    )
