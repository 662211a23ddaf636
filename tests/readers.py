"""Readers and `preadv` replacements that inject faults, short reads and delays."""

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from flashmoe.errors import ReadError
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
        pass

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
                missing = request.offset + request.nbytes - offset
                return ReadError(path, offset, f"the file ends {missing} bytes too early")
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


def limit(buffers: Sequence[memoryview], most: int) -> list[memoryview]:
    """The first `most` bytes of buffers."""
    limited = []
    for buffer in buffers:
        if most <= 0:
            break
        limited.append(buffer[:most])
        most -= len(buffer)
    return limited


def short_preadv(seed: int, preadv: Preadv = os.preadv) -> Preadv:
    """Reads from 1 byte to all that is asked for, at random."""
    draw = random.Random(seed)
    lock = threading.Lock()

    def read(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        with lock:
            most = draw.randint(1, sum(len(buffer) for buffer in buffers))
        return preadv(descriptor, limit(buffers, most), offset)

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
