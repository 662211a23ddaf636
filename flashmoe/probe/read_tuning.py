"""How deep to read: what `flashmoe tune` races, on the store's own files."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from flashmoe.bank.arrivals import reads_apart
from flashmoe.io.depth import LARGEST_PIECE_BYTES, Depth
from flashmoe.io.files import uncached_problem
from flashmoe.io.select import ReadSettings, open_reader
from flashmoe.probe.race import RaceOutcome, Runner, affordable, measurements, race
from flashmoe.probe.read_speed import Destinations, read_for
from flashmoe.probe.record_files import (
    RecordFiles,
    cached_share,
    evict,
    ordered_batches,
    record_files,
    shuffled_batches,
)
from flashmoe.probe.tuning import Reads
from flashmoe.store.reader import Store

THREADS = (16, 32, 4, 2)
PIECE_BYTES = (256 * 1024, 1024 * 1024)
PREFILL_RECORDS = 16
LEAST_SECONDS, MOST_SECONDS = 0.03, 0.4


@dataclass(frozen=True)
class Pattern:
    """A way of asking for records: `batch` of them at a time, each complete before the next.

    `in_order` along a file, or anywhere; `apart` each as a batch of its own.
    """

    name: str
    batch: int
    in_order: bool
    apart: bool


@dataclass(frozen=True)
class ReadRow:
    """One setting at one pattern: rates in bytes per second, median and extremes.

    `is_default` marks what is read with unless something is stored.
    """

    page_cache: bool
    pattern: str
    settings: ReadSettings
    bytes_per_second: float
    slowest: float
    fastest: float
    is_default: bool
    is_chosen: bool


@dataclass(frozen=True)
class TunedReads:
    """The settings chosen for reading through the page cache and past it (None where the file
    system cannot), what was measured, and what there is to say about it."""

    cached: Reads
    uncached: Reads | None
    rows: tuple[ReadRow, ...]
    notes: tuple[str, ...]

    def rate(self, page_cache: bool, pattern: str) -> float:
        """Bytes per second of what was chosen."""
        [row] = [
            row
            for row in self.rows
            if row.is_chosen and (row.page_cache, row.pattern) == (page_cache, pattern)
        ]
        return row.bytes_per_second


def decode_pattern(store: Store, files: RecordFiles) -> Pattern:
    """Half of a token's experts, as a warm bank may miss them."""
    top_k = max(layer.layout.top_k for layer in store.manifest.layers)
    batch = min(-(-top_k // 2), files.records)
    return Pattern("decode", batch, in_order=False, apart=reads_apart(files.record.stride))


def prefill_pattern(files: RecordFiles) -> Pattern:
    """A staging group of records that follow one another."""
    return Pattern("prefill", min(PREFILL_RECORDS, files.per_file), in_order=True, apart=False)


def settings_for(record_bytes: int, page_cache: bool) -> list[ReadSettings]:
    """What is tried: the default first, then what is likeliest to be better."""
    whole = min(record_bytes, LARGEST_PIECE_BYTES)
    sizes = [size for size in (*PIECE_BYTES, whole) if size <= whole]
    depths = [Depth()]
    depths += [Depth(threads) for threads in THREADS]
    depths += [Depth(piece_bytes=size) for size in sizes]
    depths += [Depth(threads, size) for threads in THREADS for size in sizes]
    settings = [ReadSettings("pread", depth) for depth in dict.fromkeys(depths)]
    if page_cache:
        settings[5:5] = [ReadSettings("mmap"), ReadSettings("mmap", Depth(16))]
    return settings


def tune_reads(
    store: Store,
    seconds: float,
    *,
    tick: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> TunedReads:
    """Measure within about `seconds`; `tick` is called before each measurement.

    A disk so slow that a race is over after few measurements keeps the default. Raises
    ReadError when records cannot be read.
    """
    files = record_files(store)
    patterns = (decode_pattern(store, files), prefill_pattern(files))
    problem = uncached_problem(files.paths[0])
    modes = [True] if problem is not None else [True, False]
    destinations = Destinations(files, max(pattern.batch for pattern in patterns))
    draw = random.Random()
    rows: list[ReadRow] = []
    chosen: dict[bool, dict[str, ReadSettings]] = {mode: {} for mode in modes}
    ends = clock() + seconds
    # Dropping what others left there takes its time, which is not that of a measurement.
    notes = _page_cache_notes(files)
    races = [(mode, pattern) for mode in modes for pattern in patterns]
    for number, (mode, pattern) in enumerate(races):
        share = (ends - clock()) / (len(races) - number)
        outcome = _race(files, pattern, mode, share, destinations, draw, tick, clock)
        chosen[mode][pattern.name] = outcome.winner.setting
        rows += [_row(mode, pattern.name, runner, outcome) for runner in outcome.runners]
    reads = {mode: Reads(found["decode"], found["prefill"]) for mode, found in chosen.items()}
    if problem is not None:
        notes.append(f"this file system reads only through the page cache ({problem})")
    return TunedReads(reads[True], reads.get(False), tuple(rows), tuple(notes))


def _race(
    files: RecordFiles,
    pattern: Pattern,
    page_cache: bool,
    seconds: float,
    destinations: Destinations,
    draw: random.Random,
    tick: Callable[[], None],
    clock: Callable[[], float],
) -> RaceOutcome[ReadSettings]:
    settings = settings_for(files.record.stride, page_cache)
    ends = clock() + seconds
    slice_seconds = seconds / measurements(len(settings))
    slice_seconds = min(max(slice_seconds, LEAST_SECONDS), MOST_SECONDS)
    order = ordered_batches if pattern.in_order else shuffled_batches

    def measure(setting: ReadSettings) -> float:
        tick()
        opener = partial(open_reader, setting, page_cache=page_cache)
        return read_for(
            slice_seconds,
            files,
            pattern.batch,
            opener,
            destinations,
            draw,
            order=order,
            apart=pattern.apart,
        ).bytes_per_second

    started = clock()
    measure(settings[0])
    # What a measurement really takes: a slow disk needs more for one batch.
    taken = max(clock() - started, 1e-9)
    count = affordable(int((ends - clock()) / taken))
    used = lambda: 1 - (ends - clock()) / max(seconds, 1e-9)  # noqa: E731
    return race(settings[: max(count, 1)], measure, used, draw)


def _row(
    mode: bool, pattern: str, runner: Runner[ReadSettings], outcome: RaceOutcome[ReadSettings]
) -> ReadRow:
    rates = runner.final or runner.rates
    return ReadRow(
        page_cache=mode,
        pattern=pattern,
        settings=runner.setting,
        bytes_per_second=runner.median,
        slowest=min(rates),
        fastest=max(rates),
        is_default=runner is outcome.default,
        is_chosen=runner is outcome.winner,
    )


def _page_cache_notes(files: RecordFiles) -> list[str]:
    if not evict(files.paths):
        return [
            "the page cache cannot be emptied here without root: figures through it are of "
            "memory as far as it holds the files"
        ]
    left = cached_share(files.paths)
    if left:
        return [f"{left:.1%} of the files stayed in the page cache when it was emptied"]
    return []
