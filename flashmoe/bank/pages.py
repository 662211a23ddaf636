"""Pages behind memory that records are read into: large ones, and none where none is needed.

A disk takes a request of so many segments at most. In pages of 4 KiB that is about one megabyte,
in pages of 2 MiB a whole record, and kernels that run over it miss fewer translations.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np

from flashmoe.io.reader import address_of

LARGE_PAGE_BYTES = 2 << 20
# Linux: <asm-generic/mman-common.h>.
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_MADV_NOHUGEPAGE = 15


def give_back(memory: memoryview, kept_bytes: int) -> bool:
    """Give the pages behind `memory` (private, writable, flat bytes) back to the system.

    The first `kept_bytes` stay as they are; what is after them is zero then, in whole pages. It
    takes memory again when it is touched. False where that cannot be done: on other systems, and
    where memory is locked.
    """
    if sys.platform != "linux":
        return False
    if kept_bytes >= len(memory):
        return True
    start = address_of(memory)
    last = _down(start + len(memory), mmap.PAGESIZE)
    # A large page that is given back in part stays whole: what is kept of it moves to small ones.
    first = max(_down(start + kept_bytes, LARGE_PAGE_BYTES), _up(start, mmap.PAGESIZE))
    if first >= last:
        return True
    kept = bytes(memory[first - start : kept_bytes])
    _advise(first, last, _MADV_NOHUGEPAGE)
    if not _advise(first, last, _MADV_DONTNEED):
        return False
    memory[first - start : first - start + len(kept)] = kept
    return True


def touch(memory: memoryview, first_byte: int, end_byte: int) -> None:
    """Have pages behind part of `memory` before it is used, large ones as far as Linux has them
    at hand. The part holds nothing: never touched, or given back."""
    if end_byte <= first_byte:
        return
    if sys.platform == "linux":
        start = address_of(memory)
        first = max(_up(start, LARGE_PAGE_BYTES), _down(start + first_byte, LARGE_PAGE_BYTES))
        end = _down(start + end_byte, LARGE_PAGE_BYTES)
        _advise(first, end, _MADV_HUGEPAGE)
        # Where every memory gets large pages, the last one would reach far beyond the part.
        rest = max(end, _up(start, mmap.PAGESIZE))
        _advise(rest, _down(start + len(memory), mmap.PAGESIZE), _MADV_NOHUGEPAGE)
    part = np.frombuffer(memory, np.uint8)[first_byte:end_byte]
    part[:: mmap.PAGESIZE] = 0
    part[-1] = 0


def _advise(first: int, end: int, advice: int) -> bool:
    if end <= first:
        return True
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(madvise(first, end - first, advice) == 0)


def _down(address: int, unit: int) -> int:
    return address // unit * unit


def _up(address: int, unit: int) -> int:
    return -(-address // unit) * unit
