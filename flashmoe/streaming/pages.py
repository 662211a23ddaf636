"""Large pages for memory that records are read into.

A disk takes a request of so many segments at most. In pages of 4 KiB that is about one megabyte,
in pages of 2 MiB a whole record, and kernels that run over it miss fewer translations.
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np

from flashmoe.io.reader import address_of

LARGE_PAGE_BYTES = 2 << 20
_SMALL_PAGE_BYTES = 4096
# Linux: <asm-generic/mman-common.h>.
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14


def zero_in_large_pages(memory: memoryview) -> bool:
    """Give whole large pages of `memory` (private, writable, flat bytes) back and touch them anew.

    Afterwards these parts are zero and backed by large pages as far as Linux has them at hand;
    the rest is as it was. False, and nothing done, on other systems and where they are refused.
    """
    if sys.platform != "linux" or len(memory) < LARGE_PAGE_BYTES:
        return False
    start = address_of(memory)
    first = -start % LARGE_PAGE_BYTES
    size = (len(memory) - first) // LARGE_PAGE_BYTES * LARGE_PAGE_BYTES
    if size <= 0:
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if madvise(start + first, size, _MADV_HUGEPAGE) != 0:
        return False
    # What was touched keeps its small pages until it is given back.
    if madvise(start + first, size, _MADV_DONTNEED) != 0:
        return False
    np.frombuffer(memory, np.uint8)[first : first + size : _SMALL_PAGE_BYTES] = 0
    return True
