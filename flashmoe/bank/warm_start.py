"""Records that a bank held when the model ran last, on their way into its free slots."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from flashmoe.bank.arrivals import Arrival
from flashmoe.bank.meter import Meter
from flashmoe.bank.prefetch import PrefetchReads
from flashmoe.io.reader import Priority, Reader, Ticket


class WarmStart:
    """One bank's records that are read while nothing else waits to be, and what became of them.

    Counts what has been warm-started, and what of that was asked for.
    """

    def __init__(self, reader: Reader, meter: Meter) -> None:
        self._reads = PrefetchReads(reader, Priority.WARM_START)
        self._counters = meter.counters
        # Records by value, 0 the highest.
        self._rank: dict[int, int] = {}
        self._paused: list[int] = []
        # Records that landed and have not been asked for since.
        self._unused: set[int] = set()
        # Records that landed and that the policy has not been told of.
        self._landed: set[int] = set()

    def __contains__(self, record: int) -> bool:
        return record in self._reads

    def __len__(self) -> int:
        return len(self._reads)

    @property
    def slots(self) -> list[int]:
        """The slots that are being read into."""
        return self._reads.slots

    @property
    def paused(self) -> list[int]:
        """The records that `pause` gave up, the most valuable first."""
        return sorted(self._paused, key=self._rank.__getitem__)

    def rank(self, records: Sequence[int]) -> None:
        """Say which records a warm start may read, the most valuable first."""
        self._rank = {record: rank for rank, record in enumerate(records)}

    def begin(self, arrival: Arrival) -> None:
        """As `PrefetchReads.begin`."""
        self._reads.begin(arrival)

    def adopt(self, record: int) -> tuple[Ticket | None, Arrival]:
        """As `PrefetchReads.adopt`."""
        ticket, arrival = self._reads.adopt(record)
        if ticket is not None:
            self._counters.warm_started += 1
            self._counters.warm_started_used += 1
        return ticket, arrival

    def harvest(self) -> tuple[list[Arrival], list[Arrival]]:
        """As `PrefetchReads.harvest`."""
        whole, failed = self._reads.harvest()
        self._unused.update(arrival.record for arrival in whole)
        self._landed.update(arrival.record for arrival in whole)
        self._counters.warm_started += len(whole)
        return whole, failed

    def take_landed(self) -> list[int]:
        """Those that landed since this was last called, the most valuable last."""
        landed, self._landed = self._landed, set()
        return sorted(landed, key=self._rank.__getitem__, reverse=True)

    def give_up(self, pinned: Collection[int]) -> Arrival | None:
        """The least valuable record that has not begun, none of `pinned`, which is not read
        now."""
        for record in sorted(self._reads.records, key=self._rank.__getitem__, reverse=True):
            if record not in pinned and (arrival := self._reads.cancel(record)) is not None:
                return arrival
        return None

    def drop(self) -> list[Arrival]:
        """Give up what has not begun."""
        return self._reads.drop(keep=())

    def pause(self) -> list[Arrival]:
        """Give up for now what has not begun."""
        dropped = self.drop()
        self._paused = [arrival.record for arrival in dropped]
        return dropped

    def outlast(self) -> None:
        """As `PrefetchReads.outlast`."""
        self._reads.outlast()

    def use(self, records: Collection[int]) -> None:
        """Note that records were asked for."""
        used = self._unused.intersection(records)
        self._unused -= used
        self._counters.warm_started_used += len(used)

    def forget(self, record: int) -> None:
        """Note that a record was evicted."""
        self._unused.discard(record)
