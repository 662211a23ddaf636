"""How requests are cut into pieces, so that few of them still fill the disk's queue.

The native library cuts in the same way (native/reader.cpp).
"""

from __future__ import annotations

from itertools import pairwise

DEFAULT_THREADS = 8
# What uncached reads are aligned to (file offset, address and size), and where pieces are cut.
BLOCK_BYTES = 4096
LEAST_PIECE_BYTES = 128 * 1024
MOST_PIECE_BYTES = 1024 * 1024


def piece_bytes(batch_bytes: int, threads: int) -> int:
    """The most that a piece of a batch has: a piece for each thread, within bounds."""
    return min(max(batch_bytes // threads, LEAST_PIECE_BYTES), MOST_PIECE_BYTES)


def cut(begin: int, end: int, most_bytes: int) -> list[tuple[int, int]]:
    """The file range begin .. end in pieces of about equal size, cut where blocks begin."""
    count = -(-(end - begin) // most_bytes)
    inner = (begin + (end - begin) * i // count for i in range(1, count))
    marks = [begin, *(mark // BLOCK_BYTES * BLOCK_BYTES for mark in inner), end]
    return [(a, b) for a, b in pairwise(marks) if a < b]
