"""Reading with the native library's pool: no Python runs while pieces are read."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from typing import Any

from flashmoe.base.errors import ReadCancelled, ReadError
from flashmoe.io.depth import DEFAULT_THREADS, Depth
from flashmoe.io.files import OpenFiles
from flashmoe.io.lanes import Lane
from flashmoe.io.reader import Priority, ReadCounters, Reader, ReadRequest, Ticket
from flashmoe.io.transfer import Preadv
from flashmoe.native.reader import (
    DROPPED,
    END_OF_FILE,
    OK,
    PREADV,
    WHOLE,
    FmFailure,
    FmRead,
    FmReadCounters,
    library,
)

# How long Ctrl-C may go unnoticed in a wait.
SLICE_SECONDS = 0.05
# How many tickets that nobody has waited for are kept before those that have ended are let go.
MOST_UNSEEN = 32
# Added to the place of an exception that a replaced preadv raised, in an errno's stead.
_FOREIGN = 1 << 20


class NativeReader(Reader):
    """Batches are read by `threads` threads of the native library, in pieces as `Depth` says.

    Without `page_cache` files are read past the page cache, wherever the buffers lie.
    `preadv(fd, buffers, offset) -> bytes read` takes the system's place to inject faults.
    Raises OptionError where the library is not there, and for numbers out of range.
    """

    def __init__(
        self,
        threads: int = DEFAULT_THREADS,
        preadv: Preadv | None = None,
        *,
        page_cache: bool = True,
        piece_bytes: int | None = None,
    ) -> None:
        depth = Depth(threads, piece_bytes)
        self._library = library()
        self._files = OpenFiles(page_cache)
        self._lock = threading.Lock()
        self._raised: list[BaseException] = []
        self._raised_lock = threading.Lock()
        self._callback = PREADV() if preadv is None else PREADV(self._calling(preadv))
        # Batches that may still be written to: their buffers have to stay.
        self._running: set[NativeTicket] = set()
        self._look_at = MOST_UNSEEN
        self._last_counters = ReadCounters()
        self._handle: Any = self._library.fm_reader_open(
            depth.threads, depth.piece_bytes or 0, not page_cache, self._callback
        )
        if self._handle is None:
            raise MemoryError("no memory for a reader")

    @property
    def counters(self) -> ReadCounters:
        with self._lock:
            if self._handle is not None:
                self._last_counters = self._count()
            return self._last_counters

    def lane(self, depth: Depth) -> Reader:
        with self._lock:
            if self._handle is None:
                raise ReadError("-", 0, "the reader is closed")
            number = self._library.fm_reader_add_lane(
                self._handle, depth.threads, depth.piece_bytes or 0
            )
        if number < 0:
            raise MemoryError("no memory for a lane")
        return Lane(self, number)

    def submit(
        self,
        requests: Sequence[ReadRequest],
        priority: Priority = Priority.DEMAND,
        lane: int = 0,
    ) -> NativeTicket:
        opened = [self._files.descriptor(request.path, request.offset) for request in requests]
        reads: Any = (FmRead * len(requests))()
        for read, request, descriptor in zip(reads, requests, opened, strict=True):
            vectors = request.scatter.vectors
            read.offset, read.fd = request.offset, descriptor
            read.buffers, read.n_buffers = ctypes.addressof(vectors), len(vectors) // 2
        with self._lock:
            if self._handle is None:
                path, offset = (requests[0].path, requests[0].offset) if requests else ("-", 0)
                raise ReadError(str(path), offset, "the reader is closed")
            if len(self._running) >= self._look_at:
                # A copy, because waits in other threads take tickets out meanwhile.
                for earlier in tuple(self._running):
                    if earlier.done():
                        self._running.discard(earlier)
                self._look_at = 2 * len(self._running) + MOST_UNSEEN
            ticket = NativeTicket(self, requests)
            # Before anything can be written; an interrupted call leaves it there for good.
            self._running.add(ticket)
            ticket.begin(self._handle, reads, priority, lane)
        return ticket

    def wait_any(self, tickets: Sequence[Ticket]) -> int:
        if not tickets:
            raise ValueError("there is no ticket to wait for")
        handles = (ctypes.c_void_p * len(tickets))(*(_handle_of(ticket) for ticket in tickets))
        try:
            while True:
                index = self._library.fm_ticket_wait(handles, len(tickets), SLICE_SECONDS)
                if index >= 0:
                    return int(index)
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            for ticket in tickets:
                assert isinstance(ticket, NativeTicket)
                ticket.outlast()
            raise

    def drain(self) -> None:
        interrupted: BaseException | None = None
        while True:
            try:
                with self._lock:
                    if self._handle is None or self._library.fm_reader_drain(
                        self._handle, SLICE_SECONDS
                    ):
                        break
            except BaseException as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted

    def close(self) -> None:
        self._files.refuse()
        with self._lock:
            if self._handle is not None:
                self._last_counters = self._count()
                handle, self._handle = self._handle, None
                self._library.fm_reader_close(handle)
                self._running.clear()
        self._files.close()

    def ended(self, ticket: NativeTicket) -> None:
        """Nothing is written to the buffers of this ticket any more."""
        self._running.discard(ticket)

    def raised(self, error: int) -> BaseException | None:
        """The exception of a replaced preadv that stands behind an errno."""
        return self._raised[error - _FOREIGN] if error >= _FOREIGN else None

    def _count(self) -> ReadCounters:
        totals = FmReadCounters()
        self._library.fm_reader_counters(self._handle, ctypes.byref(totals))
        busy = totals.busy_seconds
        depth = totals.open_seconds / busy if busy else 0.0
        return ReadCounters(totals.reads, totals.bytes, totals.seconds, busy, depth)

    def _calling(self, preadv: Preadv) -> Any:
        def call(descriptor: int, vectors: int, count: int, offset: int) -> int:
            try:
                flat = (ctypes.c_size_t * (2 * count)).from_address(vectors)
                buffers = [
                    memoryview((ctypes.c_char * flat[i + 1]).from_address(flat[i])).cast("B")
                    for i in range(0, 2 * count, 2)
                ]
                return preadv(descriptor, buffers, offset)
            except OSError as error:
                return -(error.errno or 0)
            except BaseException as error:
                with self._raised_lock:
                    self._raised.append(error)
                    return -(_FOREIGN + len(self._raised) - 1)

        return call


class NativeTicket(Ticket):
    """A batch that the library works on."""

    def __init__(self, reader: NativeReader, requests: Sequence[ReadRequest]) -> None:
        self._library = library()
        self._reader = reader
        self._requests = tuple(requests)
        self._handle = ctypes.c_void_p()

    def begin(self, reader: Any, reads: Any, priority: Priority, lane: int) -> None:
        """Queue the batch."""
        # The library fills the handle in, so that an interrupt cannot lose it.
        code = self._library.fm_reader_submit(
            reader, reads, len(reads), priority, lane, ctypes.byref(self._handle)
        )
        if code != OK:
            self._reader.ended(self)
            raise MemoryError("no thread or memory to read with")

    def handle(self) -> int:
        """The library's ticket."""
        assert self._handle.value is not None
        return self._handle.value

    def done(self) -> bool:
        return bool(self._handle) and self._ended_within(0)

    def cancel(self) -> int:
        return int(self._library.fm_ticket_cancel(self._handle))

    def wait(self) -> None:
        try:
            while not self._ended_within(SLICE_SECONDS):
                pass
        except BaseException:
            self.outlast()
            raise
        self._reader.ended(self)
        failure = FmFailure()
        error = self._library.fm_ticket_failure(self._handle, ctypes.byref(failure))
        if error != WHOLE:
            raise self._error(failure)

    def outlast(self) -> None:
        """Cancel, and wait for what runs, however often that is interrupted."""
        while True:
            try:
                self.cancel()
                if self._ended_within(SLICE_SECONDS):
                    return
            except BaseException:
                continue

    def _ended_within(self, seconds: float) -> bool:
        return bool(self._library.fm_ticket_wait(ctypes.byref(self._handle), 1, seconds) == 0)

    def _error(self, failure: Any) -> BaseException:
        request = self._requests[failure.request]
        path = str(request.path)
        if failure.error == DROPPED:
            return ReadCancelled(path, request.offset)
        if failure.error == END_OF_FILE:
            missing = request.offset + request.nbytes - failure.offset
            return ReadError(path, failure.offset, f"the file ends {missing} bytes too early")
        raised = self._reader.raised(failure.error)
        if raised is not None:
            return raised
        return ReadError(path, failure.offset, os.strerror(failure.error), failure.error)

    def __del__(self) -> None:
        # The reader keeps tickets that have not ended.
        if self._handle:
            self._library.fm_ticket_free(self._handle)


def _handle_of(ticket: Ticket) -> int:
    assert isinstance(ticket, NativeTicket)
    return ticket.handle()
