"""Reading through memory maps: the page cache's own pages, copied to where they are wanted.

A page that is not in the page cache costs a page fault, during which the thread waits for the
disk. On Linux the kernel is asked to bring a piece's pages in first, which reports a bad sector
or a truncated file as an error. Elsewhere, and should a page be given back before it is copied,
such a fault ends the process: that is how memory maps fail.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashmoe.base.errors import ReadError
from flashmoe.io.depth import DEFAULT_THREADS
from flashmoe.io.files import OpenFiles
from flashmoe.io.pool import PooledReader, ReadPiece, Work
from flashmoe.io.reader import ReadCounters

MADV_WILLNEED = 3
MADV_POPULATE_READ = 22  # Linux 5.14
_Mapping = npt.NDArray[np.uint8]


class MmapReader(PooledReader):
    """Maps files whole and copies pieces out of them, `threads` at a time.

    Page faults are counted around each copy where the system counts them per thread (Linux);
    elsewhere the counters are those of the whole process since the reader was opened.
    """

    def __init__(self, threads: int = DEFAULT_THREADS, piece_bytes: int | None = None) -> None:
        super().__init__(OpenFiles(), threads, piece_bytes)
        self._mappings: dict[Path, _Mapping] = {}
        self._guard = threading.Lock()
        self._faults = (0, 0)
        self._faults_before = _process_faults()

    @property
    def counters(self) -> ReadCounters:
        faults = self._faults
        if not _PER_THREAD:
            now = _process_faults()
            faults = (now[0] - self._faults_before[0], now[1] - self._faults_before[1])
        return replace(super().counters, minor_faults=faults[0], major_faults=faults[1])

    def close(self) -> None:
        super().close()
        with self._guard:
            # Unmapped when the last array over it goes.
            self._mappings.clear()

    def _worker(self) -> Work:
        return self._copy

    def _copy(self, piece: ReadPiece) -> None:
        before = _thread_faults()
        try:
            mapping = self._present(piece)
            source = mapping.ctypes.data + piece.begin
            start, left = piece.job.request.offset, piece.end - piece.begin
            for address, size in piece.job.request.scatter.addresses:
                skipped = max(0, min(piece.begin - start, size))
                count = min(size - skipped, left)
                if count:
                    # ctypes lets other threads run meanwhile.
                    ctypes.memmove(address + skipped, source, count)
                source += count
                left -= count
                start += size
        finally:
            after = _thread_faults()
            with self._guard:
                minor, major = self._faults
                self._faults = (minor + after[0] - before[0], major + after[1] - before[1])

    def _present(self, piece: ReadPiece) -> _Mapping:
        """The mapping of a piece's file, its pages brought in where the system can do that."""
        request = piece.job.request
        end = request.offset + request.nbytes
        size = os.fstat(piece.job.descriptor).st_size
        if size < piece.end:
            at = max(size, piece.begin)
            reason = f"the file ends {end - at} bytes too early"
            raise ReadError(str(request.path), at, reason)
        with self._guard:
            mapping = self._mappings.get(request.path)
            if mapping is None or len(mapping) < piece.end:
                mapping = _map(request.path, piece.job.descriptor, piece.begin)
                self._mappings[request.path] = mapping
        number = _bring_in(mapping.ctypes.data, piece.begin, piece.end)
        if number:
            raise ReadError(str(request.path), piece.begin, os.strerror(number), number)
        return mapping


def _map(path: Path, descriptor: int, offset: int) -> _Mapping:
    try:
        mapped = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    except OSError as error:
        raise ReadError(str(path), offset, str(error.strerror), error.errno) from None
    return np.frombuffer(mapped, np.uint8)


def _bring_in(address: int, begin: int, end: int) -> int:
    """Fault the pages of begin .. end in; an errno, or 0 also where that cannot be asked for."""
    if sys.platform != "linux":
        return 0
    first = begin // mmap.PAGESIZE * mmap.PAGESIZE
    span = (ctypes.c_void_p(address + first), ctypes.c_size_t(end - first))
    # The whole range at once, in reads as large as the disk likes them.
    _libc().madvise(*span, MADV_WILLNEED)
    if _libc().madvise(*span, MADV_POPULATE_READ) == 0:
        return 0
    number = ctypes.get_errno()
    # The kernel does not say what went wrong when a page cannot be had.
    return {errno.EINVAL: 0, errno.EFAULT: errno.EIO}.get(number, number)


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


_PER_THREAD = hasattr(resource, "RUSAGE_THREAD")


def _thread_faults() -> tuple[int, int]:
    """Minor and major page faults of this thread; zeros where only the process has counts."""
    if not _PER_THREAD:
        return 0, 0
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_minflt, usage.ru_majflt


def _process_faults() -> tuple[int, int]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt, usage.ru_majflt
