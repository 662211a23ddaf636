"""One process per store, unless it is shared.

Two models of one store in two processes each take the memory that they found free, and read past
each other. In one process that is the caller's business.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import weakref
from collections.abc import Iterator
from pathlib import Path

from flashmoe.base.errors import StoreInUseError
from flashmoe.store.manifest import MANIFEST_NAME
from flashmoe.store.reader import Store

_NAME = re.compile(r"([0-9a-f]+-[0-9a-f]+)\.(\d+)\.lock")


class Claim:
    """This process's hold on a store, until it is released or forgotten, or the process ends.

    Every process has a file for every store that it holds, named by both, and locked (flock) for
    as long as it holds: a file that is not locked is a leftover.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._close = None if descriptor is None else weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        """Let others have the store; releasing twice is fine."""
        if self._close is not None:
            self._close()


def claim(store: Store, locks: Path, *, share: bool = False) -> Claim:
    """Hold a store for this process; `locks` is where this user's locks are kept.

    Raises StoreInUseError when another process holds it, unless `share` is given. One that was
    let in that way keeps out others that are not. Where no lock can be kept, nothing is held.
    """
    identity = _identity(store)
    try:
        locks.mkdir(parents=True, exist_ok=True)
        with _alone(locks):
            others = _holders(locks, identity) - {os.getpid()}
            if others and not share:
                raise StoreInUseError(str(store.path), min(others))
            flags = os.O_RDWR | os.O_CREAT
            descriptor = os.open(locks / f"{identity}.{os.getpid()}.lock", flags, 0o644)
            held = Claim(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError:
        return Claim(None)
    return held


def _identity(store: Store) -> str:
    """The same for every path that leads to a store."""
    found = store.file(MANIFEST_NAME).stat()
    return f"{found.st_dev:x}-{found.st_ino:x}"


@contextlib.contextmanager
def _alone(locks: Path) -> Iterator[None]:
    """Nobody else looks or claims meanwhile."""
    descriptor = os.open(locks / "door", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _holders(locks: Path, identity: str) -> set[int]:
    """The processes that hold a store; files that nobody holds are removed, of any store."""
    holders = set()
    for path in locks.glob("*.lock"):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        descriptor = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        except BlockingIOError:
            if match[1] == identity:
                holders.add(int(match[2]))
        finally:
            os.close(descriptor)
    return holders
