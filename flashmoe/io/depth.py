"""How requests are cut into pieces, so that few of them still fill the disk's queue.

The native library cuts in the same way (native/reader.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from flashmoe.base.errors import OptionError

DEFAULT_THREADS = 8
MOST_THREADS = 256
# What uncached reads are aligned to (file offset, address and size), and where pieces are cut.
BLOCK_BYTES = 4096
# The bounds of pieces whose size follows the batch.
LEAST_PIECE_BYTES = 128 * 1024
MOST_PIECE_BYTES = 1024 * 1024
# The most that may be asked for.
LARGEST_PIECE_BYTES = 1024 * 1024 * 1024


@dataclass(frozen=True)
class Depth:
    """How much of a file is asked of the disk at once.

    `threads` pieces at a time, each of `piece_bytes` at most, give or take a block; None cuts a
    batch into a piece for each thread, of 128 KiB to 1 MiB. Raises OptionError for numbers out
    of range.
    """

    threads: int = DEFAULT_THREADS
    piece_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= MOST_THREADS:
            raise OptionError(f"a reader has 1 to {MOST_THREADS} threads, not {self.threads}")
        size = self.piece_bytes
        if size is not None and not BLOCK_BYTES <= size <= LARGEST_PIECE_BYTES:
            raise OptionError(
                f"pieces have {BLOCK_BYTES} to {LARGEST_PIECE_BYTES} bytes, not {size}"
            )

    def piece_of(self, batch_bytes: int) -> int:
        """The most that a piece of a batch has."""
        if self.piece_bytes is not None:
            return self.piece_bytes
        return min(max(batch_bytes // self.threads, LEAST_PIECE_BYTES), MOST_PIECE_BYTES)


def cut(begin: int, end: int, most_bytes: int) -> list[tuple[int, int]]:
    """The file range begin .. end in pieces of about equal size, cut where blocks begin."""
    count = -(-(end - begin) // most_bytes)
    inner = (begin + (end - begin) * i // count for i in range(1, count))
    # The block that a small piece would begin with may begin before the range does.
    marks = [begin, *(max(begin, mark // BLOCK_BYTES * BLOCK_BYTES) for mark in inner), end]
    return [(a, b) for a, b in pairwise(marks) if a < b]
