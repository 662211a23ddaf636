"""Records on their way into slots before anybody has asked for them."""

from __future__ import annotations

from collections.abc import Collection

from flashmoe.errors import ReadError
from flashmoe.io.reader import Priority, Reader, Ticket
from flashmoe.streaming.arrivals import Arrival


class ReadAhead:
    """Low-priority reads of one bank, each a batch of its own."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        # Without a ticket only while, or when, its submission was interrupted.
        self._coming: dict[int, tuple[Ticket | None, Arrival]] = {}

    def __contains__(self, expert: int) -> bool:
        return expert in self._coming

    def __len__(self) -> int:
        return len(self._coming)

    @property
    def slots(self) -> list[int]:
        """The slots that are being read into."""
        return [arrival.slot for _, arrival in self._coming.values()]

    def begin(self, arrival: Arrival) -> None:
        """Read one more record, after everything that is demanded.

        Raises ReadError when the file cannot be opened; then nothing is read.
        """
        self._coming[arrival.expert] = (None, arrival)
        try:
            ticket = self._reader.submit([arrival.request], Priority.FORECAST)
        except ReadError:
            del self._coming[arrival.expert]
            raise
        self._coming[arrival.expert] = (ticket, arrival)

    def adopt(self, expert: int) -> tuple[Ticket | None, Arrival]:
        """Hand over a record that is on its way: a ticket to wait for, or None when it had not
        begun and has to be demanded into the same slot."""
        ticket, arrival = self._coming[expert]
        if ticket is None:
            self._reader.drain()
        del self._coming[expert]
        if ticket is None:
            return None, arrival
        return (None if ticket.cancel() else ticket), arrival

    def harvest(self) -> tuple[list[Arrival], list[Arrival]]:
        """The records that are whole by now, and those that failed: a demand will say why."""
        ended: dict[int, bool] = {}
        for expert, (ticket, _) in self._coming.items():
            if ticket is None:
                self._reader.drain()
                ended[expert] = False
            elif ticket.done():
                ended[expert] = _succeeded(ticket)
        # Only now, so that an interrupted wait loses none.
        arrivals = [(self._coming.pop(expert)[1], whole) for expert, whole in ended.items()]
        return [a for a, whole in arrivals if whole], [a for a, whole in arrivals if not whole]

    def drop(self, keep: Collection[int]) -> list[Arrival]:
        """Cancel what has not begun and is not kept; what has begun is let go on."""
        dropped = []
        for expert, (ticket, arrival) in list(self._coming.items()):
            if expert not in keep and ticket is not None and ticket.cancel():
                del self._coming[expert]
                dropped.append(arrival)
        return dropped

    def finish(self) -> tuple[list[Arrival], list[Arrival]]:
        """Cancel what has not begun, and wait for what has: the records that are whole, and the
        others. Nothing is on its way then."""
        for ticket, _ in self._coming.values():
            if ticket is not None:
                ticket.cancel()
        for ticket, _ in self._coming.values():
            if ticket is not None:
                _succeeded(ticket)
        return self.harvest()


def _succeeded(ticket: Ticket) -> bool:
    try:
        ticket.wait()
    except ReadError:
        return False
    return True
