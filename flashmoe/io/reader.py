"""The contract every reader keeps."""

from __future__ import annotations

import abc
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from flashmoe.io.depth import Depth


class Priority(IntEnum):
    """Which waiting reads begin first: none begins while one of a lower number waits."""

    DEMAND = 0
    PREFETCH = 1
    WARM_START = 2


class Scatter(Sequence[memoryview]):
    """Writable, flat byte buffers that are filled one after the other; it never changes.

    What a reader has to know about them (addresses, sizes) is worked out once, so a
    destination that is read into again and again is worth keeping.
    """

    __slots__ = ("_vectors", "_views", "addresses", "nbytes")

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._views = tuple(buffers)
        # Address and size of the buffers that are not empty, one after the other.
        self.addresses: list[tuple[int, int]] = [
            (address_of(view), len(view)) for view in self._views if len(view)
        ]
        self.nbytes = sum(size for _, size in self.addresses)
        self._vectors: Any = None

    @classmethod
    def of(cls, buffers: Sequence[memoryview]) -> Scatter:
        """The buffers as a Scatter, which they may be already."""
        return buffers if isinstance(buffers, cls) else cls(buffers)

    @property
    def vectors(self) -> Any:
        """The buffers that are not empty as a C array of struct iovec (address, size)."""
        if self._vectors is None:
            flat = [value for pair in self.addresses for value in pair]
            self._vectors = (ctypes.c_size_t * len(flat))(*flat)
        return self._vectors

    @overload
    def __getitem__(self, index: int) -> memoryview: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[memoryview]: ...

    def __getitem__(self, index: int | slice) -> memoryview | Sequence[memoryview]:
        return self._views[index]

    def __len__(self) -> int:
        return len(self._views)


def address_of(buffer: memoryview) -> int:
    """Where a writable buffer of at least one byte begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@dataclass(frozen=True)
class ReadRequest:
    """Fill `buffers` (writable, flat, bytes) one after the other from `offset` of `path`."""

    path: Path
    offset: int
    buffers: Sequence[memoryview]

    @cached_property
    def scatter(self) -> Scatter:
        return Scatter.of(self.buffers)

    @property
    def nbytes(self) -> int:
        return self.scatter.nbytes


class Ticket(abc.ABC):
    """A submitted batch."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Return once every byte of the batch is in place.

        Raises ReadError for the first request that failed, or else ReadCancelled if one was
        dropped, after all requests have ended: no buffer is written to once this returns or
        raises. An interrupted wait cancels, waits for what is running, and raises then.
        """

    @abc.abstractmethod
    def done(self) -> bool:
        """Whether every request has ended, in whichever way."""

    @abc.abstractmethod
    def cancel(self) -> int:
        """Drop the requests that have not begun; returns how many. Those that have, go on."""


@dataclass(frozen=True)
class ReadCounters:
    """Totals since the reader was opened.

    `reads` and `bytes` count requests that were read whole. `seconds` adds up over concurrent
    reads; `busy_seconds` is the time with at least one request not ended, and
    `mean_queue_depth` the average number of requests not ended over that time.
    Page faults are those of reading: a reader that maps files counts them, others leave 0.
    """

    reads: int = 0
    bytes: int = 0
    seconds: float = 0.0
    busy_seconds: float = 0.0
    mean_queue_depth: float = 0.0
    minor_faults: int = 0
    major_faults: int = 0


class Reader(abc.ABC):
    """Reads batches of byte ranges; closed readers refuse further batches.

    A request may be read in several pieces at once, in any order.
    """

    @property
    @abc.abstractmethod
    def counters(self) -> ReadCounters:
        """The totals so far; a closed reader keeps them."""

    @abc.abstractmethod
    def submit(
        self, requests: Sequence[ReadRequest], priority: Priority = Priority.DEMAND
    ) -> Ticket:
        """Start reading a batch, behind earlier batches of the same priority.

        Raises ReadError when a file cannot be opened; then nothing of the batch is read.
        """

    def lane(self, depth: Depth) -> Reader:
        """This reader for batches that are read at another depth, so many pieces at a time for
        all of the lane's batches; priorities hold across lanes, and closing a lane closes
        nothing. A reader that has no depth is its own lane.
        """
        return self

    @abc.abstractmethod
    def wait_any(self, tickets: Sequence[Ticket]) -> int:
        """The index of a ticket whose batch has ended; its `wait` tells how.

        Blocks until there is one. Raises ValueError without tickets. When interrupted it does
        for all the tickets what an interrupted `wait` does for one.
        """

    @abc.abstractmethod
    def drain(self) -> None:
        """Drop all that has not begun and return once nothing is being read."""

    @abc.abstractmethod
    def close(self) -> None:
        """Wait for what was submitted and give back files and threads; closing twice is fine."""
