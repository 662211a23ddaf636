"""Records on their way into slots before anybody has asked for them."""

from __future__ import annotations

from collections.abc import Collection

from flashmoe.bank.arrivals import Arrival
from flashmoe.base.errors import ReadError
from flashmoe.io.reader import Priority, Reader, Ticket

# Reads of one priority begin in order, and no reader has as many of them under way.
UNDER_WAY = 16


class PrefetchReads:
    """Low-priority reads of one bank, each a batch of its own."""

    def __init__(self, reader: Reader, priority: Priority = Priority.PREFETCH) -> None:
        self._reader = reader
        self._priority = priority
        # Without a ticket only while, or when, its submission was interrupted.
        self._coming: dict[int, tuple[Ticket | None, Arrival]] = {}

    def __contains__(self, record: int) -> bool:
        return record in self._coming

    def __len__(self) -> int:
        return len(self._coming)

    @property
    def records(self) -> list[int]:
        """The records that are being read, in the order in which that began."""
        return list(self._coming)

    @property
    def slots(self) -> list[int]:
        """The slots that are being read into."""
        return [arrival.slot for _, arrival in self._coming.values()]

    def begin(self, arrival: Arrival) -> None:
        """Read one more record, after everything that is demanded.

        Raises ReadError when the file cannot be opened; then nothing is read.
        """
        self._coming[arrival.record] = (None, arrival)
        try:
            ticket = self._reader.submit([arrival.request], self._priority)
        except ReadError:
            del self._coming[arrival.record]
            raise
        self._coming[arrival.record] = (ticket, arrival)

    def adopt(self, record: int) -> tuple[Ticket | None, Arrival]:
        """Hand over a record that is on its way: a ticket to wait for, or None when it had not
        begun and has to be demanded into the same slot."""
        ticket, arrival = self._coming[record]
        if ticket is None:
            self._reader.drain()
        del self._coming[record]
        if ticket is None:
            return None, arrival
        return (None if ticket.cancel() else ticket), arrival

    def harvest(self) -> tuple[list[Arrival], list[Arrival]]:
        """The records that are whole by now, and those that failed: a demand will say why."""
        ended: dict[int, bool] = {}
        under_way = 0
        for record, (ticket, _) in self._coming.items():
            if ticket is None:
                self._reader.drain()
                ended[record] = False
            elif ticket.done():
                ended[record] = _succeeded(ticket)
            else:
                under_way += 1
                if under_way == UNDER_WAY:
                    break
        # Only now, so that an interrupted wait loses none.
        arrivals = [(self._coming.pop(record)[1], whole) for record, whole in ended.items()]
        return [a for a, whole in arrivals if whole], [a for a, whole in arrivals if not whole]

    def cancel(self, record: int) -> Arrival | None:
        """Cancel one that has not begun; None when it has."""
        ticket, arrival = self._coming[record]
        if ticket is None or not ticket.cancel():
            return None
        del self._coming[record]
        return arrival

    def give_up(self, keep: Collection[int]) -> tuple[Arrival, bool] | None:
        """Take one back that is not kept, and whether it was read whole: the last that has not
        begun, or else the first, which is waited for. None when all are kept."""
        others = [record for record in self._coming if record not in keep]
        for record in reversed(others):
            if (arrival := self.cancel(record)) is not None:
                return arrival, False
        if not others:
            return None
        ticket, arrival = self._coming[others[0]]
        if ticket is None:
            self._reader.drain()
        whole = ticket is not None and _succeeded(ticket)
        del self._coming[others[0]]
        return arrival, whole

    def outlast(self) -> None:
        """Return once all have ended, in whichever way."""
        for ticket, _ in self._coming.values():
            if ticket is not None:
                _succeeded(ticket)

    def drop(self, keep: Collection[int]) -> list[Arrival]:
        """Cancel what has not begun and is not kept; what has begun is let go on."""
        others = [record for record in self._coming if record not in keep]
        dropped = [self.cancel(record) for record in others]
        return [arrival for arrival in dropped if arrival is not None]

    def finish(self) -> tuple[list[Arrival], list[Arrival]]:
        """Cancel what has not begun, and wait for what has: the records that are whole, and the
        others. Nothing is on its way then."""
        for ticket, _ in self._coming.values():
            if ticket is not None:
                ticket.cancel()
        self.outlast()
        return self.harvest()


def _succeeded(ticket: Ticket) -> bool:
    try:
        ticket.wait()
    except ReadError:
        return False
    return True
