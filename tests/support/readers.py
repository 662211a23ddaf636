"""Readers and `preadv` replacements that inject faults, short reads, delays and disorder."""

import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flashmoe.base.errors import ReadCancelled, ReadError
from flashmoe.io.reader import Priority, ReadCounters, Reader, ReadRequest, Ticket

Preadv = Callable[[int, Sequence[memoryview], int], int]


class MemoryReader(Reader):
    """Reads from bytes in memory; `bad_offset` is a byte that gives EIO in every file."""

    def __init__(self, files: Mapping[Path, bytes], bad_offset: int | None = None) -> None:
        self._counters = ReadCounters()
        self._files = files
        self.bad_offset = bad_offset
        self._closed = False
        self._lock = threading.Lock()

    @property
    def counters(self) -> ReadCounters:
        return self._counters

    def submit(
        self, requests: Sequence[ReadRequest], priority: Priority = Priority.DEMAND
    ) -> Ticket:
        for request in requests:
            if self._closed:
                raise ReadError(str(request.path), request.offset, "the reader is closed")
            if request.path not in self._files:
                reason = os.strerror(errno.ENOENT)
                raise ReadError(str(request.path), request.offset, reason, errno.ENOENT)
        return MemoryTicket([self._read(request) for request in requests])

    def wait_any(self, tickets: Sequence[Ticket]) -> int:
        if not tickets:
            raise ValueError("there is no ticket to wait for")
        return 0

    def drain(self) -> None:
        """Nothing runs on."""

    def close(self) -> None:
        self._closed = True

    def _read(self, request: ReadRequest) -> ReadError | None:
        content = self._files[request.path]
        path, offset = str(request.path), request.offset
        bad = self.bad_offset
        if bad is not None and offset <= bad < offset + request.nbytes:
            return ReadError(path, offset, os.strerror(errno.EIO), errno.EIO)
        for buffer in request.buffers:
            part = content[offset : offset + len(buffer)]
            buffer[: len(part)] = part
            offset += len(part)
            if len(part) < len(buffer):
                return end_of_file(request, offset)
        with self._lock:
            counters = self._counters
            self._counters = replace(
                counters, reads=counters.reads + 1, bytes=counters.bytes + request.nbytes
            )
        return None


class MemoryTicket(Ticket):
    def __init__(self, outcomes: Sequence[ReadError | None]) -> None:
        self._outcomes = outcomes

    def wait(self) -> None:
        for error in self._outcomes:
            if error is not None:
                raise error

    def done(self) -> bool:
        return True

    def cancel(self) -> int:
        return 0


def end_of_file(request: ReadRequest, offset: int) -> ReadError:
    missing = request.offset + request.nbytes - offset
    return ReadError(str(request.path), offset, f"the file ends {missing} bytes too early")


class FaultyReader(Reader):
    """Any reader, its requests split at random and submitted in random order and with delays.

    `bad_offset` is a byte that gives EIO in every file.
    """

    def __init__(self, inner: Reader, seed: int = 0, bad_offset: int | None = None) -> None:
        self._inner = inner
        self._draw = random.Random(seed)
        self._bad_offset = bad_offset
        self._counters = ReadCounters()
        self._lock = threading.Lock()

    @property
    def counters(self) -> ReadCounters:
        totals = self._counters
        return replace(self._inner.counters, reads=totals.reads, bytes=totals.bytes)

    def submit(
        self, requests: Sequence[ReadRequest], priority: Priority = Priority.DEMAND
    ) -> Ticket:
        # Files that cannot be opened, and a closed reader, are known before anything is read.
        self._inner.submit([replace(request, buffers=()) for request in requests]).wait()
        with self._lock:
            parts = [Part(i, part) for i, r in enumerate(requests) for part in self._split(r)]
            self._draw.shuffle(parts)
            pauses = [self._draw.choice([0, 0, 0, 0.0003]) for _ in parts]
        for part, pause in zip(parts, pauses, strict=True):
            time.sleep(pause)
            begin, end = part.read.offset, part.read.offset + part.read.nbytes
            if self._bad_offset is not None and begin <= self._bad_offset < end:
                reason = os.strerror(errno.EIO)
                part.error = ReadError(str(part.read.path), begin, reason, errno.EIO)
            else:
                part.ticket = self._inner.submit([part.read], priority)
        return FaultyTicket(self, requests, parts)

    def wait_any(self, tickets: Sequence[Ticket]) -> int:
        if not tickets:
            raise ValueError("there is no ticket to wait for")
        while True:
            for i, ticket in enumerate(tickets):
                if ticket.done():
                    return i
            time.sleep(0.0005)

    def drain(self) -> None:
        self._inner.drain()

    def close(self) -> None:
        self._inner.close()

    def count(self, reads: int, nbytes: int) -> None:
        with self._lock:
            totals = self._counters
            self._counters = replace(
                totals, reads=totals.reads + reads, bytes=totals.bytes + nbytes
            )

    def _split(self, request: ReadRequest) -> list[ReadRequest]:
        buffers, offset = list(request.buffers), request.offset
        parts = []
        while left := sum(map(len, buffers)):
            size = self._draw.randint(1, max(1, min(left, 3 * request.nbytes // 4)))
            parts.append(ReadRequest(request.path, offset, limit(buffers, size)))
            offset += size
            buffers = beyond(buffers, size)
        return parts


@dataclass
class Part:
    """A part of a request of a batch."""

    index: int
    read: ReadRequest
    ticket: Ticket | None = None
    error: ReadError | None = field(default=None)


class FaultyTicket(Ticket):
    def __init__(
        self, reader: FaultyReader, requests: Sequence[ReadRequest], parts: Sequence[Part]
    ) -> None:
        self._reader = reader
        self._requests = requests
        self._parts = sorted(parts, key=lambda part: (part.index, part.read.offset))
        self._counted = False

    def wait(self) -> None:
        for part in self._parts:
            if part.ticket is not None:
                with contextlib.suppress(ReadError):
                    part.ticket.wait()
        errors: dict[int, ReadError] = {}
        dropped = None
        for part in self._parts:
            error = part.error
            try:
                if part.ticket is not None:
                    part.ticket.wait()
            except ReadCancelled as cancelled:
                dropped = dropped or cancelled
            except ReadError as caught:
                error = caught
                if error.errno is None:
                    error = end_of_file(self._requests[part.index], error.offset)
            if error is not None:
                errors.setdefault(part.index, error)
        whole = [r for i, r in enumerate(self._requests) if i not in errors]
        if not self._counted and dropped is None:
            self._counted = True
            self._reader.count(len(whole), sum(request.nbytes for request in whole))
        if errors:
            raise errors[min(errors)]
        if dropped:
            raise dropped

    def done(self) -> bool:
        return all(part.ticket is None or part.ticket.done() for part in self._parts)

    def cancel(self) -> int:
        cancelled = {
            part.index for part in self._parts if part.ticket is not None and part.ticket.cancel()
        }
        return len(cancelled)


def limit(buffers: Sequence[memoryview], most: int) -> list[memoryview]:
    """The first `most` bytes of buffers."""
    limited = []
    for buffer in buffers:
        if most <= 0:
            break
        limited.append(buffer[:most])
        most -= len(buffer)
    return limited


def beyond(buffers: Sequence[memoryview], skipped: int) -> list[memoryview]:
    """Buffers without their first `skipped` bytes."""
    left = []
    for buffer in buffers:
        if skipped < len(buffer):
            left.append(buffer[skipped:])
        skipped = max(0, skipped - len(buffer))
    return left


def short_preadv(seed: int, preadv: Preadv = os.preadv, block: int = 1) -> Preadv:
    """Reads from one block to all that is asked for, at random."""
    draw = random.Random(seed)
    lock = threading.Lock()

    def read(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        with lock:
            blocks = draw.randint(1, -(-sum(len(buffer) for buffer in buffers) // block))
        return preadv(descriptor, limit(buffers, blocks * block), offset)

    return read


def delayed_preadv(seed: int, preadv: Preadv = os.preadv) -> Preadv:
    """Waits up to a millisecond before each read, so that reads end in any order."""
    draw = random.Random(seed)
    lock = threading.Lock()

    def read(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        with lock:
            seconds = draw.choice([0, 0, 0.0003, 0.001])
        time.sleep(seconds)
        return preadv(descriptor, buffers, offset)

    return read


def broken_preadv(bad_offset: int, preadv: Preadv = os.preadv) -> Preadv:
    """EIO for every read that covers the byte at `bad_offset`."""

    def read(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset <= bad_offset < offset + sum(len(buffer) for buffer in buffers):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    return read
