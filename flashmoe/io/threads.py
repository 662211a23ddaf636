"""Concurrent preadv from a pool of Python threads (the GIL is released while the disk works)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from flashmoe.errors import ReadError
from flashmoe.io.reader import ReadCounters, Reader, ReadRequest

DEFAULT_THREADS = 8
# What one preadv takes at most on Linux and macOS (IOV_MAX).
MOST_BUFFERS = 1024

Preadv = Callable[[int, Sequence[memoryview], int], int]


class ThreadReader(Reader):
    """One preadv per request, continued after short reads, `threads` requests at a time.

    `preadv(fd, buffers, offset) -> bytes read` can be replaced to inject faults.
    """

    def __init__(self, threads: int = DEFAULT_THREADS, preadv: Preadv = os.preadv) -> None:
        self.counters = ReadCounters()
        self._preadv = preadv
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="flashmoe-read")
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, requests: Sequence[ReadRequest]) -> ThreadTicket:
        opened = [(self._descriptor(request), request) for request in requests]
        ticket = ThreadTicket()
        try:
            for descriptor, request in opened:
                ticket.futures.append(self._pool.submit(self._read, descriptor, request))
        except BaseException:
            wait(ticket.futures)
            raise
        return ticket

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        with self._lock:
            self._closed = True
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _descriptor(self, request: ReadRequest) -> int:
        with self._lock:
            if self._closed:
                raise ReadError(str(request.path), request.offset, "the reader is closed")
            if request.path not in self._descriptors:
                try:
                    self._descriptors[request.path] = os.open(request.path, os.O_RDONLY)
                except OSError as error:
                    raise ReadError(
                        str(request.path), request.offset, str(error.strerror), error.errno
                    ) from None
            return self._descriptors[request.path]

    def _read(self, descriptor: int, request: ReadRequest) -> None:
        started = time.perf_counter()
        buffers = [buffer for buffer in request.buffers if buffer]
        offset = request.offset
        while buffers:
            try:
                count = self._preadv(descriptor, buffers[:MOST_BUFFERS], offset)
            except OSError as error:
                raise ReadError(
                    str(request.path), offset, str(error.strerror), error.errno
                ) from None
            if count == 0:
                missing = sum(len(buffer) for buffer in buffers)
                raise ReadError(
                    str(request.path), offset, f"the file ends {missing} bytes too early"
                )
            offset += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if count:
                buffers[0] = buffers[0][count:]
        with self._lock:
            self.counters.reads += 1
            self.counters.bytes += request.nbytes
            self.counters.seconds += time.perf_counter() - started


class ThreadTicket:
    """The futures of one batch."""

    def __init__(self) -> None:
        self.futures: list[Future[None]] = []

    def wait(self) -> None:
        try:
            wait(self.futures)
        except BaseException:
            # Interrupted: still, nobody may reuse a buffer that a thread is writing to.
            wait(self.futures)
            raise
        for future in self.futures:
            future.result()
