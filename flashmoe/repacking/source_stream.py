"""Reading a source ahead of what is made of it, in order, by several threads."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from flashmoe.checkpoint.files import BLOCK_BYTES, SourceFile
from flashmoe.repacking.schedule import PIECE_BYTES, Group

# What one request of the Hub, or one read of a disk, asks for.
REQUEST_BYTES = 8 * 2**20
# Read but not yet used; one group may be larger.
AHEAD_BYTES = 64 * 2**20
CONNECTIONS = 8
DISK_READERS = 2
# Groups are rarely larger.
BUFFER_BYTES = 2 * PIECE_BYTES + 2 * BLOCK_BYTES


class Buffers:
    """Memory of one size that is used again, because fresh pages are slow; it begins on a page."""

    def __init__(self) -> None:
        self._free: deque[memoryview] = deque()

    def take(self, size_bytes: int) -> memoryview:
        if size_bytes > BUFFER_BYTES:
            return _pages(size_bytes)
        try:
            return self._free.pop()
        except IndexError:
            return _pages(BUFFER_BYTES)

    def give_back(self, buffer: memoryview) -> None:
        if len(buffer) == BUFFER_BYTES:
            self._free.append(buffer)


def _pages(size_bytes: int) -> memoryview:
    memory = mmap.mmap(-1, size_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


class SourceStream:
    """Reads groups of source files in the order given; use it as a context manager.

    Iterating gives (file index, group, its bytes); the bytes are valid until the next but one.
    """

    def __init__(self, files: Sequence[SourceFile], groups: Iterable[tuple[int, Group]]) -> None:
        self._files = files
        self._groups = iter(groups)
        self._buffers = Buffers()
        self._waiting: deque[tuple[int, Group, memoryview, int, list[Future[None]]]] = deque()
        self._ahead_bytes = 0
        remote = any(file.path is None for file in files)
        self._pool = ThreadPoolExecutor(
            CONNECTIONS if remote else DISK_READERS, thread_name_prefix="flashmoe-source"
        )
        self._stopped = threading.Event()

    def __enter__(self) -> SourceStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped.set()
        if kind is not None:
            for file in self._files:
                file.stop()
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[int, Group, memoryview]]:
        used: deque[memoryview] = deque()
        self._fill()
        while self._waiting:
            index, group, buffer, shift, reads = self._waiting.popleft()
            for read in reads:
                read.result()
            size_bytes = group.end - group.begin
            yield index, group, buffer[shift : shift + size_bytes]
            self._ahead_bytes -= size_bytes
            used.append(buffer)
            if len(used) > 1:
                self._buffers.give_back(used.popleft())
            self._fill()

    def _fill(self) -> None:
        while not self._waiting or self._ahead_bytes < AHEAD_BYTES:
            following = next(self._groups, None)
            if following is None:
                return
            index, group = following
            file = self._files[index]
            begin, end = group.begin, group.end
            if file.path is not None:
                # Whole blocks, which need not go through the page cache.
                begin -= begin % BLOCK_BYTES
                end = min(end + -end % BLOCK_BYTES, file.size_bytes)
            buffer = self._buffers.take(end - begin)
            reads = [
                self._pool.submit(
                    self._read,
                    file,
                    first,
                    buffer[first - begin : min(first + REQUEST_BYTES, end) - begin],
                )
                for first in range(begin, end, REQUEST_BYTES)
            ]
            self._waiting.append((index, group, buffer, group.begin - begin, reads))
            self._ahead_bytes += group.end - group.begin

    def _read(self, file: SourceFile, offset: int, out: memoryview) -> None:
        if not self._stopped.is_set():
            file.read_into(offset, out)
