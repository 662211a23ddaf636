"""The plainest concurrent reading there is, to compare readers with."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flashmoe.base.errors import ReadError
from flashmoe.io.files import OpenFiles
from flashmoe.io.reader import address_of

LARGE_PAGE_BYTES = 2 * 2**20


def plain_rate(
    places: Sequence[tuple[Path, int]],
    size_bytes: int,
    threads: int,
    seconds: float,
    page_cache: bool,
) -> float:
    """Bytes per second that threads get which each read `size_bytes` at one place after the
    other, for `seconds` or until every (path, offset) was read once.

    Every thread has one buffer, in large pages where there are any; nothing is split, scattered
    or waited for. Raises ReadError when a place cannot be read.
    """
    with contextlib.closing(OpenFiles(page_cache)) as files:
        opened = {path: files.descriptor(path, 0) for path, _ in places}
        todo = iter([(path, opened[path], offset) for path, offset in places])
        ready = threading.Barrier(threads + 1)
        with ThreadPoolExecutor(threads) as pool:
            sizes = [
                pool.submit(_read_on, todo, size_bytes, seconds, ready) for _ in range(threads)
            ]
            ready.wait()
            started = time.perf_counter()
            total = sum(size.result() for size in sizes)
            return total / (time.perf_counter() - started)


def _read_on(
    todo: Iterator[tuple[Path, int, int]],
    size_bytes: int,
    seconds: float,
    ready: threading.Barrier,
) -> int:
    """Read what `todo`, which threads share, says; returns the bytes read."""
    # Where the memory is in few large pages, one request to the disk can be large too.
    whole = mmap.mmap(-1, size_bytes + LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel without them refuses.
        with contextlib.suppress(OSError):
            whole.madvise(mmap.MADV_HUGEPAGE)
    whole.write(bytes(len(whole)))
    view = memoryview(whole)
    first = -address_of(view) % LARGE_PAGE_BYTES
    buffer = view[first : first + size_bytes]
    total = 0
    ready.wait()
    deadline = time.perf_counter() + seconds
    # A list's iterator hands out each item once, whoever asks.
    for path, descriptor, offset in todo:
        try:
            count = os.preadv(descriptor, [buffer], offset)
        except OSError as error:
            raise ReadError(str(path), offset, str(error.strerror), error.errno) from None
        if count == 0:
            raise ReadError(str(path), offset, "the file ends too early")
        total += count
        if time.perf_counter() > deadline:
            break
    return total
