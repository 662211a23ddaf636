"""A Linux memory cgroup, version 1 or 2: it counts the page cache too, so that what does not fit
is really read from the disk. Needs root."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashmoe.base.errors import FlashMoEError

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
PATIENCE_SECONDS = 5.0


class CgroupError(FlashMoEError):
    """No memory cgroup can be made here; the text says why."""


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """A new group limited to `limit_bytes`, removed at the end; yields the file to which a
    process writes its id to enter. Raises CgroupError."""
    try:
        if V1.is_dir():
            group = _make(V1, {"memory.limit_in_bytes": str(limit_bytes)})
        else:
            if "memory" not in (V2 / "cgroup.subtree_control").read_text().split():
                (V2 / "cgroup.subtree_control").write_text("+memory")
            group = _make(V2, {"memory.max": str(limit_bytes), "memory.swap.max": "0"})
    except OSError as error:
        raise CgroupError(
            f"a memory cgroup cannot be made under {V2}: {error.strerror}; it takes Linux and root"
        ) from error
    try:
        yield group / "cgroup.procs"
    finally:
        _remove(group)


def _make(parent: Path, settings: dict[str, str]) -> Path:
    group = parent / f"flashmoe-{os.getpid()}"
    group.mkdir()
    try:
        for name, value in settings.items():
            # Without a swap controller there is no swap to limit.
            if name != "memory.swap.max" or (group / name).exists():
                (group / name).write_text(value)
    except OSError:
        _remove(group)
        raise
    return group


def _remove(group: Path) -> None:
    """A group stays busy for a moment after its last process has ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
