"""Filling one piece of a request with preadv; the Python twin of native/transfer.cpp.

Reads begin and end where blocks do. A block that lies whole and aligned within one buffer is
read in place, others by way of a bounce buffer. With blocks of one byte that is every byte in
place, which is what reads through the page cache do.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Sequence

from flashmoe.io.depth import BLOCK_BYTES
from flashmoe.io.reader import Scatter, address_of

# What one preadv takes at most on Linux and macOS (IOV_MAX).
MOST_BUFFERS = 1024
BOUNCE_BYTES = 256 * 1024

Preadv = Callable[[int, Sequence[memoryview], int], int]


class EndOfFile(Exception):
    """There is nothing at `offset`."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


class FailedRead(Exception):
    """The operating system refused to read at `offset`."""

    def __init__(self, offset: int, number: int) -> None:
        super().__init__(offset, number)
        self.offset = offset
        self.errno = number


class Transfer:
    """Fills pieces, one at a time: a thread has its own."""

    def __init__(self, preadv: Preadv, uncached: bool) -> None:
        self._preadv = preadv
        self._block = BLOCK_BYTES if uncached else 1
        self._bounce: memoryview | None = None

    def fill(self, descriptor: int, scatter: Scatter, start: int, begin: int, end: int) -> None:
        """Read begin .. end of the file into `scatter`, whose first byte is that at `start`.

        Raises EndOfFile, FailedRead, and what else `preadv` raises.
        """
        block = self._block
        done = begin
        while done < end:
            position = done // block * block
            vectors, bounced = self._assemble(scatter, start, position, done, end)
            try:
                count = self._preadv(descriptor, vectors, position)
            except OSError as error:
                raise FailedRead(done, error.errno or errno.EIO) from None
            valid = min(position + count, end)
            if valid <= done:
                # Nothing new came: the file ends here, unless the disk gives part of a block.
                if count and block > 1 and os.fstat(descriptor).st_size > done:
                    raise FailedRead(done, errno.EIO)
                raise EndOfFile(done)
            for source, first in bounced:
                low = max(first, done)
                high = min(first + len(source), valid)
                for target in _targets(scatter, start, low, high):
                    size = len(target)
                    target[:] = source[low - first : low - first + size]
                    low += size
            done = valid

    def _assemble(
        self, scatter: Scatter, start: int, position: int, done: int, end: int
    ) -> tuple[list[memoryview], list[tuple[memoryview, int]]]:
        """Buffers for one read from `position`, and which of them stand in for the real ones
        (with the file offset of each)."""
        block = self._block
        vectors: list[memoryview] = []
        bounced: list[tuple[memoryview, int]] = []
        used = 0
        last_bounced = False
        for view, first in _places(scatter, start, done, end):
            # The file range of this buffer that is wanted and not yet in `vectors`.
            stop = first + len(view)
            while position < stop and len(vectors) < MOST_BUFFERS:
                size = (stop - position) // block * block
                if position >= max(first, done) and size:
                    part = view[position - first : position - first + size]
                    if block == 1 or address_of(part) % block == 0:
                        vectors.append(part)
                        position += size
                        last_bounced = False
                        continue
                if used == BOUNCE_BYTES:
                    return vectors, bounced
                if self._bounce is None:
                    self._bounce = memoryview(mmap.mmap(-1, BOUNCE_BYTES))
                if last_bounced:
                    source, at = bounced[-1]
                    grown = self._bounce[used - len(source) : used + block]
                    vectors[-1], bounced[-1] = grown, (grown, at)
                else:
                    grown = self._bounce[used : used + block]
                    vectors.append(grown)
                    bounced.append((grown, position))
                used += block
                position += block
                last_bounced = True
            if len(vectors) == MOST_BUFFERS:
                break
        return vectors, bounced


def _places(scatter: Scatter, start: int, begin: int, end: int) -> list[tuple[memoryview, int]]:
    """The buffers that hold begin .. end of the file, cut at `end`, with their file offsets."""
    places = []
    for view in scatter:
        stop = start + len(view)
        if stop > begin and start < end and len(view):
            places.append((view[: end - start], start))
        start = stop
    return places


def _targets(scatter: Scatter, start: int, begin: int, end: int) -> list[memoryview]:
    """The memory of begin .. end of the file."""
    return [view[max(begin - first, 0) :] for view, first in _places(scatter, start, begin, end)]
