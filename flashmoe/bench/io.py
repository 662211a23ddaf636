"""How fast the readers bring records in, beside what else the same files give."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from flashmoe.base.errors import OptionError
from flashmoe.base.progress import Progress
from flashmoe.bench.baselines import Rival, find_rival
from flashmoe.io.depth import DEFAULT_THREADS
from flashmoe.io.files import uncached_problem
from flashmoe.probe.read_speed import (
    MMAP,
    Destinations,
    ReadMeasurement,
    add_counters,
    open_titled,
    read_for,
    reader_titles,
)
from flashmoe.probe.record_files import RecordFiles, cached_share, evict, record_files
from flashmoe.store.reader import open_store

BATCHES = (1, 2, 4, 8, 10, 32)
MOST_BATCH = 256
# A token misses some of its top-k experts: decode's pattern.
DECODE_BATCHES = range(2, 11)
TARGET_SHARE = 0.95
CACHED, UNCACHED = "cached", "uncached"


@dataclass(frozen=True)
class ReadResult:
    """One mode, batch size and reader, or the rival (nothing but rates).

    `bytes_per_second` is the median over rounds, `slowest` and `fastest` its extremes; `share`
    is the median over rounds of this rate by the rival's in the same round. `queue_depth` is
    the mean number of records in flight while any is. Faults are page faults per GB (10^9 bytes).
    """

    mode: str
    batch: int
    reader: str
    bytes_per_second: float
    slowest: float
    fastest: float
    share: float | None = None
    queue_depth: float | None = None
    minor_faults_per_gb: float | None = None
    major_faults_per_gb: float | None = None


@dataclass(frozen=True)
class Verdict:
    """One reader at decode's pattern.

    `share` of the rival is the median over these batches and all rounds, `lowest_share` that of
    the batch where it is lowest; `reached` says whether `share` is at least `target`.
    """

    mode: str
    reader: str
    rival: str
    batches: tuple[int, ...]
    share: float
    lowest_share: float
    lowest_batch: int
    target: float
    reached: bool


@dataclass(frozen=True)
class ReadReport:
    """What `bench_io` measured.

    `rivals` maps a mode to what it is compared with, `notes` are sentences that qualify the
    figures. `records` of `record_bytes` each are in `files` files; every measurement took
    `seconds` in each of `rounds` rounds.
    """

    store: str
    files: int
    records: int
    record_bytes: int
    threads: int
    seconds: float
    rounds: int
    rivals: dict[str, str]
    notes: tuple[str, ...]
    results: tuple[ReadResult, ...]
    verdicts: tuple[Verdict, ...]


@dataclass
class _Group:
    """What the rounds gave for one mode and batch size: the rival's rates, and per reader."""

    mode: str
    batch: int
    rival: Rival
    rates: list[float]
    readings: dict[str, list[ReadMeasurement]]

    def shares(self, title: str) -> list[float]:
        """A reader's rate by the rival's, round by round."""
        pairs = zip(self.readings[title], self.rates, strict=True)
        return [reading.bytes_per_second / rate for reading, rate in pairs]


def bench_io(
    folder: str | Path,
    *,
    reader: str | None = None,
    batches: Sequence[int] | None = None,
    seconds: float = 0.4,
    rounds: int = 3,
    threads: int = DEFAULT_THREADS,
    progress: Progress = lambda done, total: None,
) -> ReadReport:
    """Read a store's records through the page cache, emptied before, and past it.

    `reader` is pread, mmap or auto; None means all. Readers and the rival take turns within a
    round. Raises StoreError when `folder` is no store, OptionError for a reader or batch that
    cannot be, ReadError when records cannot be read, FlashMoEError when the rival fails.
    """
    titles = reader_titles(reader)
    files = record_files(open_store(folder))
    sizes = _batch_sizes(files, batches)
    notes = _page_cache_notes(files)
    problem = uncached_problem(files.paths[0])
    if problem is not None:
        notes.append(f"this file system reads only through the page cache ({problem})")
    # Memory maps are the page cache.
    readers = {CACHED: titles, UNCACHED: [title for title in titles if title != MMAP]}
    modes = [mode for mode in readers if readers[mode] and (mode == CACHED or problem is None)]
    steps = rounds * len(sizes) * sum(1 + len(readers[mode]) for mode in modes)
    groups = []
    for mode in modes:
        middle = min(sizes, key=lambda size: abs(size - 4))
        rival, said = find_rival(
            files, mode == CACHED, middle, seconds, tick=lambda: progress(0, steps)
        )
        notes += said
        groups += [
            _Group(mode, size, rival, [], {title: [] for title in readers[mode]}) for size in sizes
        ]
    destinations = Destinations(files, max(sizes))
    draw = random.Random()
    done = 0
    for _ in range(rounds):
        for group in groups:
            # The machine and its disk speed up and slow down, so rates that are compared are
            # taken right after one another, in any order.
            for title in draw.sample([None, *group.readings], 1 + len(group.readings)):
                progress(done, steps)
                done += 1
                if title is None:
                    evict(files.paths)
                    group.rates.append(group.rival.rate(group.batch, seconds))
                else:
                    opener = partial(open_titled, title, threads, group.mode == CACHED)
                    reading = read_for(seconds, files, group.batch, opener, destinations, draw)
                    group.readings[title].append(reading)
    progress(steps, steps)
    return ReadReport(
        store=str(folder),
        files=len(files.paths),
        records=files.records,
        record_bytes=files.record.stride,
        threads=threads,
        seconds=seconds,
        rounds=rounds,
        rivals={group.mode: group.rival.name for group in groups},
        notes=tuple(notes),
        results=tuple(result for group in groups for result in _results(group)),
        verdicts=tuple(
            verdict
            for mode in modes
            for title in readers[mode]
            for verdict in _verdicts(
                [g for g in groups if g.mode == mode and g.batch in DECODE_BATCHES], title
            )
        ),
    )


def _batch_sizes(files: RecordFiles, batches: Sequence[int] | None) -> list[int]:
    if batches is None:
        return [size for size in BATCHES if size <= files.records]
    for size in batches:
        if not 1 <= size <= min(MOST_BATCH, files.records):
            raise OptionError(
                f"batch must be 1 to {min(MOST_BATCH, files.records)} records here, not {size}"
            )
    return sorted(set(batches))


def _page_cache_notes(files: RecordFiles) -> list[str]:
    if not evict(files.paths):
        return [
            "the page cache cannot be emptied here without root: cached figures are of memory "
            "as far as it holds the files"
        ]
    left = cached_share(files.paths)
    return [f"{left:.1%} of the files stayed in the page cache when it was emptied"] if left else []


def _results(group: _Group) -> list[ReadResult]:
    results = [_result(group, group.rival.name, group.rates)]
    for title, readings in group.readings.items():
        total = add_counters([reading.counters for reading in readings])
        gigabytes = total.bytes / 1e9
        results.append(
            replace(
                _result(group, title, [reading.bytes_per_second for reading in readings]),
                share=statistics.median(group.shares(title)),
                queue_depth=total.mean_queue_depth,
                minor_faults_per_gb=total.minor_faults / gigabytes,
                major_faults_per_gb=total.major_faults / gigabytes,
            )
        )
    return results


def _result(group: _Group, name: str, rates: list[float]) -> ReadResult:
    return ReadResult(
        mode=group.mode,
        batch=group.batch,
        reader=name,
        bytes_per_second=statistics.median(rates),
        slowest=min(rates),
        fastest=max(rates),
    )


def _verdicts(groups: Sequence[_Group], title: str) -> list[Verdict]:
    """The verdict on one reader over groups of one mode; none over none."""
    if not groups:
        return []
    share = statistics.median([share for group in groups for share in group.shares(title)])
    lowest = min(groups, key=lambda group: statistics.median(group.shares(title)))
    return [
        Verdict(
            mode=lowest.mode,
            reader=title,
            rival=lowest.rival.name,
            batches=tuple(group.batch for group in groups),
            share=share,
            lowest_share=statistics.median(lowest.shares(title)),
            lowest_batch=lowest.batch,
            target=TARGET_SHARE,
            reached=share >= TARGET_SHARE,
        )
    ]
