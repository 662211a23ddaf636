"""A disk that really is full: a small one of memory, mounted for the test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashmoe import StoreError, repack
from flashmoe.repacking import walk
from flashmoe.store.reader import is_store
from tests.support.refusals import refused
from tests.support.skips import require
from tests.support.stores import folder_content

DISK_BYTES = 3_000_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own; skipped where this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    require("mount")
    mounted = subprocess.run(command, capture_output=True, check=False)
    require("permission to mount", mounted.returncode == 0)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small(float_qwen: Path, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(os.urandom(DISK_BYTES * 9 // 10))
    dest = small_disk / "dest.flashmoe"
    with refused(StoreError, str(dest), "free"):
        repack(float_qwen, dest, bits=32)
    assert not is_store(dest)


@pytest.mark.parametrize("watched", [False, True], ids=["full", "nearly full"])
def test_a_disk_that_fills_up(
    float_qwen: Path,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    watched: bool,
) -> None:
    """Someone else takes the room; once it is back, the same command ends with the same store."""
    monkeypatch.setattr("flashmoe.repacking.schedule.PIECE_BYTES", 2**16)
    monkeypatch.setattr(walk, "STEP_SECONDS", 0.0 if watched else 1000.0)
    monkeypatch.setattr(walk, "RESERVE_BYTES", 2**17)
    dest, other = small_disk / "dest.flashmoe", small_disk / "other"

    def fill(done: int, total: int) -> None:
        if 3 * done > total and not other.exists():
            status = os.statvfs(small_disk)
            other.write_bytes(bytes(status.f_bavail * status.f_bsize))

    with refused(StoreError, str(dest), "run the same command again"):
        repack(float_qwen, dest, bits=32, progress=fill)
    assert not is_store(dest)
    other.unlink()
    seen: list[int] = []
    repack(float_qwen, dest, bits=32, progress=lambda done, total: seen.append(done))
    whole = folder_content(repack(float_qwen, tmp_path / "whole.flashmoe", bits=32).path)
    assert folder_content(dest) == whole
    # What was whole is not written again: the first thing reported after 0 is not the first piece.
    assert seen[1] > 2**17
