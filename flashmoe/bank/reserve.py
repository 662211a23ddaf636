"""MLX arrays of which only what is touched takes memory.

MLX cannot use memory that others allocated, and writes all of what it allocates itself, except
where it reads a file: there it hands its fresh memory to the file's `readinto`, and this one
writes nothing.
"""

from __future__ import annotations

import io
import mmap
import sys
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe.bank.pages import give_back
from flashmoe.base.dtypes import shared_bytes

# MLX waits for every single operation once it counts more memory than its limit as in use, and
# it counts what is only reserved.
_NO_LIMIT_BYTES = 1 << 62


def reserve(n_words: int) -> mx.array | None:
    """Zeros [n_words] uint64 that take no memory yet (whole pages of them).

    None where there is no such thing: on other systems, on GPUs, and where Linux is set to refuse
    memory that nobody has asked to use yet. Changes MLX's memory limit.
    """
    if sys.platform != "linux" or mx.default_device() != mx.cpu:
        return None
    mx.set_memory_limit(_NO_LIMIT_BYTES)
    source: Any = _Hollow(n_words)
    try:
        loaded: Any = mx.load(source, format="npy")
        mx.eval(loaded)
    except (RuntimeError, MemoryError):
        return None
    array: mx.array = loaded
    # What the allocator had used before is neither zero nor without pages.
    memory = shared_bytes(array)
    edge = min(len(memory), mmap.PAGESIZE)
    memory[:edge] = bytes(edge)
    memory[len(memory) - edge :] = bytes(edge)
    return array if give_back(memory, 0) else None


class _Hollow(io.BytesIO):
    """A .npy file of uint64 [n_words] whose content stays what the buffers it is read into hold.

    A Ctrl-C in what MLX calls beside `readinto` would be lost: that is left to C.
    """

    def __init__(self, n_words: int) -> None:
        super().__init__()
        form = {"descr": "<u8", "fortran_order": False, "shape": (n_words,)}
        np.lib.format.write_array_header_1_0(self, form)
        self.seek(0)

    def readinto(self, buffer: Any) -> int:
        of_header = super().readinto(buffer)
        self.seek(len(buffer) - of_header, io.SEEK_CUR)
        return len(buffer)
