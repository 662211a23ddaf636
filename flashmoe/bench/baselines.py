"""What `bench io` compares with: `fio`, or else plain reading by as many threads as pay most.

Rivals read whole records at random, each at most once where the page cache is on, and keep
their queue full: nothing waits until a batch is complete, as decode has to.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashmoe.base.errors import FlashMoEError
from flashmoe.io.plain import plain_rate
from flashmoe.probe.record_files import RecordFiles, evict, shuffled_batches

# Those that keep a queue by themselves, and one that takes a thread per read in flight. With
# the page cache on, libaio is that thread alone.
UNCACHED_ENGINES = ("io_uring", "libaio", "psync") if sys.platform == "linux" else ("psync",)
CACHED_ENGINES = ("io_uring", "psync") if sys.platform == "linux" else ("psync",)
THREAD_COUNTS = (1, 2, 4, 8, 16, 32)
TRIALS = 3
# Beyond the seconds of reading: starting, laying out jobs, stopping.
GRACE_SECONDS = 30.0


class Rival(ABC):
    """Something that reads the same records by its own means."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What tables call it."""

    @abstractmethod
    def rate(self, batch: int, seconds: float) -> float:
        """Bytes per second with `batch` records in flight, over `seconds` or until everything
        was read once. With the page cache on, the files have been evicted before."""


class FioFailed(FlashMoEError):
    """fio did not give a rate."""


@dataclass(frozen=True)
class Fio(Rival):
    """fio's random reads of the record's size from where records begin."""

    program: str
    engine: str
    files: RecordFiles
    page_cache: bool

    @property
    def name(self) -> str:
        return f"fio {self.engine}"

    def command(self, batch: int, seconds: float) -> list[str]:
        """The command line. With psync every job has its share of each file's records, so that
        no job finds in the page cache what another one brought there."""
        jobs = min(batch, self.files.per_file) if self.engine == "psync" else 1
        stride = self.files.record.stride
        share = self.files.per_file // jobs
        names = [str(path).replace("\\", "\\\\").replace(":", "\\:") for path in self.files.paths]
        line = [
            self.program,
            "--output-format=json",
            "--thread",
            "--group_reporting",
            f"--filename={':'.join(names)}",
            "--readonly",
            "--rw=randread",
            "--file_service_type=random",
            # Another sequence in every run: the disk may have a cache of its own.
            "--allrandrepeat=0",
            f"--bs={stride}",
            f"--ioengine={self.engine}",
            f"--iodepth={1 if self.engine == 'psync' else batch}",
            f"--direct={int(not self.page_cache)}",
            "--invalidate=1",
            f"--runtime={max(1, round(seconds * 1000))}ms",
        ]
        if not self.page_cache:
            line.append("--time_based")
        for job in range(jobs):
            line += [
                f"--name=job{job}",
                f"--offset={self.files.offset(job * share)}",
                f"--size={share * stride * len(self.files.paths)}",
            ]
        return line

    def rate(self, batch: int, seconds: float) -> float:
        line = self.command(batch, seconds)
        try:
            done = subprocess.run(
                line, capture_output=True, text=True, timeout=seconds + GRACE_SECONDS, check=False
            )
        except OSError as error:
            raise FioFailed(f"{self.program} cannot be run: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            limit = seconds + GRACE_SECONDS
            raise FioFailed(f"{self.name} did not end within {limit:.0f} seconds") from None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[0]
            raise FioFailed(f"{self.name} ended with code {done.returncode}: {said}")
        return parse_rate(done.stdout, self.name)


def parse_rate(output: str, name: str) -> float:
    """Bytes per second out of fio's JSON; raises FioFailed when they are not in it."""
    try:
        # Warnings may come before it.
        jobs = json.loads(output[output.index("{") :])["jobs"]
        errors = [int(job["error"]) for job in jobs if job["error"]]
        total = sum(int(job["read"]["io_bytes"]) for job in jobs)
        # In whole milliseconds; a tiny store is read within one.
        milliseconds = max(int(job["read"]["runtime"]) for job in jobs)
    except (ValueError, KeyError, TypeError):
        raise FioFailed(f"{name} printed something other than its JSON report") from None
    if errors:
        raise FioFailed(f"{name} could not read: {os.strerror(errors[0])}")
    if not total:
        raise FioFailed(f"{name} read nothing")
    return total / max(milliseconds, 1) * 1000


@dataclass(frozen=True)
class PlainThreads(Rival):
    """Threads that each read whole records into a page-aligned buffer of their own.

    How many is what paid most here; the batch makes no difference.
    """

    threads: int
    files: RecordFiles
    page_cache: bool

    @property
    def name(self) -> str:
        return f"plain reading, {self.threads} threads"

    def rate(self, batch: int, seconds: float) -> float:
        batches = shuffled_batches(self.files, 1, random.Random())
        ranges = [place for [place] in batches]
        stride = self.files.record.stride
        return plain_rate(ranges, stride, self.threads, seconds, self.page_cache)


def find_rival(
    files: RecordFiles, page_cache: bool, batch: int, seconds: float, tick: Callable[[], None]
) -> tuple[Rival, list[str]]:
    """The fastest engine of fio at this batch, else the fastest number of plain threads; and
    what there is to say about it. Each is tried TRIALS times in turns, `tick` called before."""

    def fastest(rivals: Sequence[Rival]) -> tuple[Rival | None, list[str]]:
        """The one with the highest rate of those that never failed, and how others did."""
        rates: dict[Rival, float] = dict.fromkeys(rivals, 0.0)
        failures = []
        for rival in [*rivals] * TRIALS:
            if rival not in rates:
                continue
            tick()
            evict(files.paths)
            try:
                rates[rival] = max(rates[rival], rival.rate(batch, seconds))
            except FlashMoEError as error:
                failures.append(str(error))
                del rates[rival]
        return max(rates, key=rates.__getitem__, default=None), failures

    program = shutil.which("fio")
    notes = []
    if program is None:
        notes.append("fio is not installed")
    else:
        engines = CACHED_ENGINES if page_cache else UNCACHED_ENGINES
        fios = [Fio(program, engine, files, page_cache) for engine in engines]
        best, failures = fastest(fios)
        if best is not None:
            return best, []
        notes.append(failures[-1])
    plain = [PlainThreads(count, files, page_cache) for count in THREAD_COUNTS]
    best, failures = fastest(plain)
    if best is None:
        raise FlashMoEError(failures[0])
    mode = "cached" if page_cache else "uncached"
    notes[-1] += f"; {mode} reading is compared with {best.name}, the fastest of {THREAD_COUNTS}"
    return best, notes
