"""Holes of files: zeros that take no disk, and need be neither written nor read."""

from __future__ import annotations

import errno
import os
from io import FileIO

import numpy as np

# What file systems give or do not give disk for.
BLOCK_BYTES = 4096
PROBE_BYTES = 8


def filled(content: memoryview, offset: int) -> list[tuple[int, int]]:
    """The stretches (begin, end) of `content` to write, in order, if it goes to byte `offset` of
    a file of holes: everything but blocks of the file that would be zeros alone."""
    data = np.frombuffer(content, np.uint8)
    head = min(-offset % BLOCK_BYTES, len(data))
    end = head + (len(data) - head) // BLOCK_BYTES * BLOCK_BYTES
    blocks = data[head:end].reshape(-1, BLOCK_BYTES)
    wanted = np.ones(len(blocks) + 2, np.bool_)
    wanted[0], wanted[-1] = data[:head].any(), data[end:].any()
    # Hardly any block of weights begins with zeros, so hardly any is looked at whole.
    doubtful = np.flatnonzero(~blocks[:, :PROBE_BYTES].any(axis=1))
    wanted[doubtful + 1] = blocks[doubtful].any(axis=1)
    bounds = np.array([0, *range(head, end + 1, BLOCK_BYTES), len(data)])
    changes = np.flatnonzero(np.diff(wanted, prepend=False, append=False))
    edges = bounds[changes].tolist()
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def mostly_holes(file: FileIO) -> bool:
    """Whether a file takes less than half of the disk that its size says."""
    status = os.fstat(file.fileno())
    return status.st_blocks * 512 <= status.st_size // 2


def read_at(file: FileIO, out: memoryview, offset: int) -> int:
    """Read bytes from `offset` on into `out`, at most as many as it has; how many they were, 0 at
    the end of the file. Of a file that is mostly holes, these are not read. OSError."""
    # Not of others: some file systems report holes where data is still to be written.
    if mostly_holes(file):
        descriptor = file.fileno()
        end = min(offset + len(out), os.fstat(descriptor).st_size)
        data = min(_data_from(descriptor, offset, end), end)
        if data > offset:
            np.frombuffer(out, np.uint8)[: data - offset] = 0
            return data - offset
        out = out[: max(_hole_from(descriptor, offset, end) - offset, 0)]
    file.seek(offset)
    return file.readinto(out)


def _data_from(descriptor: int, offset: int, end: int) -> int:
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as error:
        # Either there is nothing but a hole, or the file system does not tell.
        return end if error.errno == errno.ENXIO else offset


def _hole_from(descriptor: int, offset: int, end: int) -> int:
    try:
        return min(os.lseek(descriptor, offset, os.SEEK_HOLE), end)
    except OSError:
        return end
