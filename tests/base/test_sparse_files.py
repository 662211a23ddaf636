"""Holes of files: nothing is lost by not writing and not reading them."""

from __future__ import annotations

import errno
import os
from io import FileIO
from pathlib import Path

import numpy as np
import pytest

from flashmoe.base import sparse_files
from flashmoe.base.sparse_files import BLOCK_BYTES, filled, read_at
from tests.support.skips import require

MIB = 2**20


def test_only_blocks_of_zeros_are_left_out() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        offset, size_bytes = (int(n) for n in rng.integers(0, 5 * BLOCK_BYTES, 2))
        content = np.zeros(size_bytes, np.uint8)
        for place in rng.integers(0, max(size_bytes, 1), min(size_bytes, int(rng.integers(0, 4)))):
            content[place] = 1
        # Blocks of the file, not of the content.
        blocks = {(offset + int(place)) // BLOCK_BYTES for place in np.flatnonzero(content)}
        written: set[int] = set()
        for begin, end in filled(content.data, offset):
            assert 0 <= begin < end <= size_bytes
            touched = range((offset + begin) // BLOCK_BYTES, -(-(offset + end) // BLOCK_BYTES))
            assert written.isdisjoint(touched)
            written.update(touched)
        assert written == blocks


def test_weights_are_one_stretch() -> None:
    content = np.random.default_rng(0).integers(0, 256, 10 * BLOCK_BYTES, np.uint8)
    content[3 * BLOCK_BYTES : 3 * BLOCK_BYTES + 64] = 0
    assert filled(content.data, 100) == [(0, len(content))]


@pytest.fixture
def sparse(tmp_path: Path) -> tuple[Path, bytes]:
    """A file of 4 MiB with 10,000 bytes in it."""
    content = bytearray(4 * MIB)
    content[MIB + 5 : MIB + 10_005] = os.urandom(10_000)
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(len(content))
        file.seek(MIB + 5)
        file.write(content[MIB + 5 : MIB + 10_005])
    return path, bytes(content)


def read(path: Path, offset: int, most_bytes: int, chunk_bytes: int) -> bytes:
    found = bytearray()
    with path.open("rb", buffering=0) as file:
        # What the buffer had before must not show through.
        while out := memoryview(bytearray(b"x" * min(chunk_bytes, most_bytes - len(found)))):
            size_bytes = read_at(file, out, offset + len(found))
            if size_bytes == 0:
                break
            found += out[:size_bytes]
    return bytes(found)


@pytest.mark.parametrize("chunk_bytes", [7_001, MIB, 8 * MIB])
def test_a_sparse_file_reads_as_ever(sparse: tuple[Path, bytes], chunk_bytes: int) -> None:
    path, content = sparse
    assert read(path, 0, 8 * MIB, chunk_bytes) == content
    assert read(path, MIB - 3, 20_000, chunk_bytes) == content[MIB - 3 : MIB + 19_997]
    assert read(path, 4 * MIB, 10, chunk_bytes) == b""


def test_holes_are_not_read(sparse: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = sparse
    require("files with holes", path.stat().st_blocks * 512 <= len(content) // 2)

    class Counting(FileIO):
        size_bytes = 0

        def readinto(self, out: memoryview) -> int:  # type: ignore[override]
            Counting.size_bytes += len(out)
            return super().readinto(out)

    monkeypatch.setattr(Path, "open", lambda self, mode, buffering: Counting(self))
    assert read(path, 0, 8 * MIB, MIB) == content
    assert 10_000 <= Counting.size_bytes < 100_000


def test_a_file_system_that_does_not_tell(
    sparse: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: int) -> int:
        raise OSError(errno.EINVAL, "no such thing here")

    monkeypatch.setattr(sparse_files.os, "lseek", refusing)
    path, content = sparse
    assert read(path, 0, 8 * MIB, MIB) == content
