"""The records that one layer call has to wait for, as they land in their slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from flashmoe.base.errors import ReadError
from flashmoe.io.reader import Reader, ReadRequest, Ticket

# Smaller records are there before it pays to compute without them.
APART_BYTES = 256 * 1024


def reads_apart(record_bytes: int) -> bool:
    """Whether records of this size are read one by one, each used as soon as it is there."""
    return record_bytes >= APART_BYTES


@dataclass(frozen=True)
class Arrival:
    """A record on its way into a slot; `row` is its staging row."""

    record: int
    slot: int
    row: int
    request: ReadRequest


class Arrivals:
    """Records being read. `land` waits for some; leaving the `with` block waits for all.

    Each record is a batch of its own when `apart`, so that it can be used before the others are
    there; otherwise all of them are one batch. Those of `begun` are being read
    already. `landed` is told of each record that is whole, `lost` of those that are not, once
    nobody writes to their slots.
    """

    def __init__(
        self,
        reader: Reader,
        arrivals: Sequence[Arrival],
        *,
        apart: bool,
        begun: Sequence[tuple[Ticket, Arrival]] = (),
        landed: Callable[[Sequence[Arrival]], None],
        lost: Callable[[Sequence[Arrival]], None],
    ) -> None:
        self._reader = reader
        self._landed = landed
        self._lost = lost
        batches = [[arrival] for arrival in arrivals] if apart else [list(arrivals)]
        # Owned from the start, so that an interrupt between two submissions loses nothing.
        self._coming: list[tuple[Ticket | None, Sequence[Arrival]]] = [
            *((None, batch) for batch in batches if batch),
            *((ticket, [arrival]) for ticket, arrival in begun),
        ]
        try:
            for i, (ticket, batch) in enumerate(self._coming):
                if ticket is None:
                    ticket = reader.submit([arrival.request for arrival in batch])
                    self._coming[i] = (ticket, batch)
        except BaseException as error:
            self._abandon(error)
            raise

    @property
    def coming(self) -> bool:
        """Whether there is something left to wait for."""
        return bool(self._coming)

    def land(self) -> list[int]:
        """Wait until one more record is whole, at least; the records that landed.

        Empty when none is left. Raises ReadError when a record cannot be read whole; then all
        that had not landed are lost.
        """
        if not self._coming:
            return []
        try:
            tickets = [ticket for ticket, _ in self._coming if ticket is not None]
            first = self._reader.wait_any(tickets)
            ended = [i for i, ticket in enumerate(tickets) if i == first or ticket.done()]
            arrived: list[Arrival] = []
            for i in ended:
                tickets[i].wait()
                arrived += self._coming[i][1]
        except BaseException as error:
            self._abandon(error)
            raise
        self._coming = [pair for i, pair in enumerate(self._coming) if i not in ended]
        self._landed(arrived)
        return [arrival.record for arrival in arrived]

    def __enter__(self) -> Arrivals:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._abandon(error)
        while self.land():
            pass

    def _abandon(self, error: BaseException) -> None:
        """Stop reading and give up everything that has not landed."""
        if not self._coming:
            return
        coming, self._coming = self._coming, []
        for ticket, _ in coming:
            if ticket is not None:
                ticket.cancel()
        try:
            if isinstance(error, ReadError):
                for ticket, _ in coming:
                    self._outlast(ticket)
            else:
                # An interrupt may have come between submitting and keeping the ticket.
                self._reader.drain()
        except BaseException:
            self._reader.drain()
            raise
        finally:
            # Drained even where draining was interrupted: nobody writes to the slots now.
            self._lost([arrival for _, batch in coming for arrival in batch])

    @staticmethod
    def _outlast(ticket: Ticket | None) -> None:
        if ticket is None:
            return
        try:
            ticket.wait()
        except ReadError:
            # The first failure is the one that is raised.
            return
