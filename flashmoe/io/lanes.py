"""A reader at another depth: batches of its own, the threads and priorities of the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from flashmoe.io.reader import Priority, ReadCounters, Reader, ReadRequest, Ticket


class Laned(Protocol):
    """A reader that batches can be submitted to by lane."""

    @property
    def counters(self) -> ReadCounters: ...

    def submit(
        self, requests: Sequence[ReadRequest], priority: Priority = ..., lane: int = ...
    ) -> Ticket: ...

    def wait_any(self, tickets: Sequence[Ticket]) -> int: ...

    def drain(self) -> None: ...


class Lane(Reader):
    """A lane of a reader, which has to be closed itself; counters and `drain` are the reader's."""

    def __init__(self, reader: Laned, lane: int) -> None:
        self._reader = reader
        self._lane = lane

    @property
    def counters(self) -> ReadCounters:
        return self._reader.counters

    def submit(
        self, requests: Sequence[ReadRequest], priority: Priority = Priority.DEMAND
    ) -> Ticket:
        return self._reader.submit(requests, priority, lane=self._lane)

    def wait_any(self, tickets: Sequence[Ticket]) -> int:
        return self._reader.wait_any(tickets)

    def drain(self) -> None:
        self._reader.drain()

    def close(self) -> None:
        pass
