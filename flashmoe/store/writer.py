"""Writing a store so that an interruption at any moment leaves nothing that looks complete.

The folder carries a lock file from the first byte on; the manifest appears by an atomic
rename after everything else is on disk, and only then the lock file goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from flashmoe.base.errors import StoreError
from flashmoe.base.sparse_files import read_at
from flashmoe.store.manifest import JOURNAL_NAME, LOCK_NAME, MANIFEST_NAME, Manifest, to_json

HASH_CHUNK_BYTES = 2**20

Bytes = bytes | bytearray | memoryview


def sha256_file(path: Path) -> str:
    """SHA-256 of a whole file, in hex."""
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(HASH_CHUNK_BYTES))
    offset = 0
    with path.open("rb", buffering=0) as file:
        while size_bytes := read_at(file, chunk, offset):
            digest.update(chunk[:size_bytes])
            offset += size_bytes
    return digest.hexdigest()


class StoreWriter:
    """Owns a destination folder from opening until `commit`; use it as a context manager.

    Leaving without `commit` keeps the lock file, which marks the folder as an incomplete store
    that a later run may write over, or go on with: `keep`, asked once the folder is this
    writer's, says whether what an interrupted run left stays. Raises StoreError when the folder
    holds a complete store (unless `force`), something that is no store, or is being written by
    another process.
    """

    def __init__(
        self, folder: Path, *, force: bool = False, keep: Callable[[], bool] | None = None
    ) -> None:
        self.folder = folder
        self._descriptors: dict[str, int] = {}
        refuse_unless_ours(folder, force)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder)
        except OSError as error:
            raise StoreError(f"{folder} cannot be created: {error.strerror}") from None
        try:
            # Again, because another process may have finished a store before the lock was ours.
            refuse_unless_ours(folder, force)
            self.resumed = not force and keep is not None and keep()
            if not self.resumed:
                self._clear()
        except OSError as error:
            os.close(self._lock)
            raise StoreError(f"{folder} cannot be written: {error.strerror}") from error
        except BaseException:
            os.close(self._lock)
            raise

    def _clear(self) -> None:
        """Remove the store or the remains that are here, first what says that there is any: from
        then on the folder is incomplete, and no run goes on with it. Files copied from a source
        are known by name, from the manifest or from the lock file that an interrupted run left."""
        ours = {*_copied_names(self.folder), *_noted_names(self.folder)}
        for name in ours:
            self._note(name)
        sync_descriptor(self._lock)
        for name in (MANIFEST_NAME, JOURNAL_NAME):
            (self.folder / name).unlink(missing_ok=True)
        sync_folder(self.folder)
        (self.folder / "experts").mkdir(exist_ok=True)
        stale = [*self.folder.glob("resident-*.safetensors"), *self.folder.glob("experts/layer-*")]
        stale += [self.folder / name for name in ours]
        for path in stale:
            path.unlink(missing_ok=True)

    def _note(self, name: str) -> None:
        _write_all(self._lock, f"{name}\n".encode())

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name in list(self._descriptors):
            self.close(name)
        os.close(self._lock)

    def create(self, name: str, header: bytes, size_bytes: int) -> None:
        """Make a file of the store, or open the one that an interrupted run left. What is not
        written of it stays a hole."""
        path = self.folder / name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._descriptors[name] = descriptor
        if os.fstat(descriptor).st_size != size_bytes:
            os.ftruncate(descriptor, size_bytes)
        _write_at(descriptor, header, 0)

    def write(self, name: str, offset: int, content: Bytes) -> None:
        """Put bytes at their place in a file that was created and not closed."""
        _write_at(self._descriptors[name], content, offset)

    def sync(self, name: str) -> None:
        """Wait until a file is on disk."""
        sync_descriptor(self._descriptors[name])

    def close(self, name: str) -> None:
        os.close(self._descriptors.pop(name))

    def release(self, name: str) -> None:
        """Let a file that is on disk go from the page cache, where it would push out others."""
        if not hasattr(os, "posix_fadvise"):
            return
        descriptor = os.open(self.folder / name, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def copy(self, path: Path) -> str:
        """Copy a small file to the top of the store; returns its SHA-256.

        Raises StoreError for a name that the store uses itself.
        """
        if path.name in (MANIFEST_NAME, LOCK_NAME):
            raise StoreError(f"{path} cannot be copied into a store, which has its own {path.name}")
        self._note(path.name)
        target = self.folder / path.name
        shutil.copyfile(path, target)
        with target.open("rb") as file:
            sync_descriptor(file.fileno())
        return sha256_file(target)

    def sync_folders(self) -> None:
        """Wait until the names of the store's files are on disk."""
        sync_folder(self.folder / "experts")
        sync_folder(self.folder)

    def commit(self, manifest: Manifest) -> None:
        """Put the manifest in place: from now on the store is complete."""
        pending = self.folder / (MANIFEST_NAME + ".part")
        with pending.open("w") as out:
            out.write(to_json(manifest))
            out.flush()
            sync_descriptor(out.fileno())
        self.sync_folders()
        pending.replace(self.folder / MANIFEST_NAME)
        sync_folder(self.folder)
        (self.folder / JOURNAL_NAME).unlink(missing_ok=True)
        (self.folder / LOCK_NAME).unlink()


def refuse_unless_ours(folder: Path, force: bool) -> None:
    """Raise StoreError unless a store may be written to `folder`."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StoreError(f"{folder} is a file; choose another destination")
    if (folder / MANIFEST_NAME).exists():
        if not force:
            raise StoreError(f"{folder} already holds a complete store; pass --force to replace it")
    elif not (folder / LOCK_NAME).exists() and any(folder.iterdir()):
        raise StoreError(f"{folder} is not empty and not a flashmoe store; choose another folder")


def _lock(folder: Path) -> int:
    """Open and hold the lock file, for appending; OSError when it cannot be created."""
    path = folder / LOCK_NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise StoreError(
                f"{folder} is being written by another process; wait for it to finish"
            ) from None
        # A lock file that went away with another writer's commit protects nothing.
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)


def _noted_names(folder: Path) -> list[str]:
    """Names that an interrupted run noted in its lock file before copying them."""
    names = (folder / LOCK_NAME).read_text(errors="replace").splitlines()
    return [name for name in names if name and Path(name).name == name]


def _copied_names(folder: Path) -> list[str]:
    """What the manifest in place says was copied, as far as it can be read."""
    try:
        names = json.loads((folder / MANIFEST_NAME).read_bytes())["copied"]
        return [name for name in names if isinstance(name, str) and Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _write_all(descriptor: int, content: Bytes) -> None:
    view = memoryview(content).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def _write_at(descriptor: int, content: Bytes, offset: int) -> None:
    view = memoryview(content).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def sync_descriptor(descriptor: int) -> None:
    """fsync, which on a Mac leaves things in the drive's own cache unless told otherwise."""
    full_sync: int | None = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is None:
        os.fsync(descriptor)
        return
    try:
        fcntl.fcntl(descriptor, full_sync)
    except OSError:  # not every file system has it
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)
