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
        # Experts by value, 0 the highest.
        self._rank: dict[int, int] = {}
        self._paused: list[int] = []
        # Experts that landed and have not been asked for since.
        self._unused: set[int] = set()
        # Experts that landed and that the policy has not been told of.
        self._landed: set[int] = set()

    def __contains__(self, expert: int) -> bool:
        return expert in self._reads

    def __len__(self) -> int:
        return len(self._reads)

    @property
    def slots(self) -> list[int]:
        """The slots that are being read into."""
        return self._reads.slots

    @property
    def paused(self) -> list[int]:
        """The experts that `pause` gave up, the most valuable first."""
        return sorted(self._paused, key=self._rank.__getitem__)

    def rank(self, experts: Sequence[int]) -> None:
        """Say which experts may be warm_started, the most valuable first."""
        self._rank = {expert: rank for rank, expert in enumerate(experts)}

    def begin(self, arrival: Arrival) -> None:
        """As `PrefetchReads.begin`."""
        self._reads.begin(arrival)

    def adopt(self, expert: int) -> tuple[Ticket | None, Arrival]:
        """As `PrefetchReads.adopt`."""
        ticket, arrival = self._reads.adopt(expert)
        if ticket is not None:
            self._counters.warm_started += 1
            self._counters.warm_started_used += 1
        return ticket, arrival

    def harvest(self) -> tuple[list[Arrival], list[Arrival]]:
        """As `PrefetchReads.harvest`."""
        whole, failed = self._reads.harvest()
        self._unused.update(arrival.expert for arrival in whole)
        self._landed.update(arrival.expert for arrival in whole)
        self._counters.warm_started += len(whole)
        return whole, failed

    def take_landed(self) -> list[int]:
        """Those that landed since this was last called, the most valuable last."""
        landed, self._landed = self._landed, set()
        return sorted(landed, key=self._rank.__getitem__, reverse=True)

    def give_up(self, pinned: Collection[int]) -> Arrival | None:
        """The least valuable record that has not begun, none of `pinned`, which is not read
        now."""
        for expert in sorted(self._reads.experts, key=self._rank.__getitem__, reverse=True):
            if expert not in pinned and (arrival := self._reads.cancel(expert)) is not None:
                return arrival
        return None

    def drop(self) -> list[Arrival]:
        """Give up what has not begun."""
        return self._reads.drop(keep=())

    def pause(self) -> list[Arrival]:
        """Give up for now what has not begun."""
        dropped = self.drop()
        self._paused = [arrival.expert for arrival in dropped]
        return dropped

    def outlast(self) -> None:
        """As `PrefetchReads.outlast`."""
        self._reads.outlast()

    def use(self, experts: Collection[int]) -> None:
        """Note that experts were asked for."""
        used = self._unused.intersection(experts)
        self._unused -= used
        self._counters.warm_started_used += len(used)

    def forget(self, expert: int) -> None:
        """Note that an expert was evicted."""
        self._unused.discard(expert)
