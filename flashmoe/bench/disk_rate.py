"""What the disk gives while something else is measured: random records of the same store."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from functools import partial

from flashmoe.bench.baselines import Rival, find_rival
from flashmoe.io.depth import DEFAULT_THREADS
from flashmoe.io.files import uncached_problem
from flashmoe.probe.read_speed import Destinations, open_titled, read_for, reader_titles
from flashmoe.probe.record_files import evict, record_files
from flashmoe.store.reader import Store

# Records in flight.
DEPTH = 8
# Per reading, and how often both read per sample.
SECONDS = 0.3
ROUNDS = 2


@dataclass(frozen=True)
class DiskRate:
    """Bytes per second, median over samples and their extremes, and who read them."""

    bytes_per_second: float
    slowest: float
    fastest: float
    by: str


class Disk:
    """Samples of a disk's rate, taken between other measurements.

    fio, or plain reading without it, and this package's own reader read in turns, past the
    page cache where the file system can; the disk's rate is that of whoever is faster.
    """

    def __init__(self, store: Store) -> None:
        self.notes: list[str] = []
        self._files = record_files(store)
        self._page_cache = uncached_problem(self._files.paths[0]) is not None
        self._depth = min(DEPTH, self._files.records)
        self._rival: Rival | None = None
        self._reader = reader_titles("pread")[0]
        self._opener = partial(open_titled, self._reader, DEFAULT_THREADS, self._page_cache)
        self._destinations: Destinations | None = None
        self._rates: dict[str, list[float]] = {self._reader: []}

    def sample(self) -> None:
        """Measure ROUNDS times more, at first finding the fastest rival.

        Raises as `find_rival` does, and ReadError.
        """
        if self._rival is None or self._destinations is None:
            self._destinations = Destinations(self._files, self._depth)
            self._rival, self.notes = find_rival(
                self._files, self._page_cache, self._depth, SECONDS, tick=lambda: None
            )
            self._rates[self._rival.name] = []
        for _ in range(ROUNDS):
            evict(self._files.paths)
            self._rates[self._rival.name].append(self._rival.rate(self._depth, SECONDS))
            reading = read_for(
                SECONDS, self._files, self._depth, self._opener, self._destinations, random.Random()
            )
            self._rates[self._reader].append(reading.bytes_per_second)

    def rate(self) -> DiskRate:
        """Of all samples so far, of which there is one at least."""
        by = max(self._rates, key=lambda name: statistics.median(self._rates[name]))
        rates = self._rates[by]
        return DiskRate(statistics.median(rates), min(rates), max(rates), by)
