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
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from flashmoe.errors import StoreError
from flashmoe.store.layout import Component, LayerLayout, TensorSpec, safetensors_header
from flashmoe.store.manifest import (
    LOCK_NAME,
    MANIFEST_NAME,
    LayerFile,
    Manifest,
    ResidentFile,
    to_json,
)

HASH_CHUNK_BYTES = 8 * 2**20

Bytes = bytes | bytearray | memoryview


def sha256_file(path: Path) -> str:
    """SHA-256 of a whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class StoreWriter:
    """Owns a destination folder from opening until `commit`; use it as a context manager.

    Leaving without `commit` keeps the lock file, which marks the folder as an incomplete store
    that a later run may write over. Raises StoreError when the folder holds a complete store
    (unless `force`), something that is no store, or is being written by another process.
    """

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        self.folder = folder
        self._layers: list[LayerWriter] = []
        refuse_unless_ours(folder, force)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder)
        except OSError as error:
            raise StoreError(f"{folder} cannot be created: {error.strerror}") from None
        try:
            # Again, because another process may have finished a store before the lock was ours.
            refuse_unless_ours(folder, force)
            self._clear()
        except OSError as error:
            os.close(self._lock)
            raise StoreError(f"{folder} cannot be written: {error.strerror}") from error
        except BaseException:
            os.close(self._lock)
            raise

    def _clear(self) -> None:
        """Remove the store or the remains that are here, the manifest first: from then on the
        folder is incomplete. Files copied from a source are known by name, from the manifest
        or from the lock file that an interrupted run left."""
        ours = {*_copied_names(self.folder), *_journal(self.folder)}
        for name in ours:
            self._note(name)
        os.fsync(self._lock)
        (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
        _sync_folder(self.folder)
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
        for layer in self._layers:
            layer.close()
        os.close(self._lock)

    def write_resident(
        self, file: str, tensors: Sequence[TensorSpec], contents: Iterable[Bytes]
    ) -> ResidentFile:
        """Write one resident shard; `contents` yields each tensor's bytes in order."""
        digest = hashlib.sha256()
        crcs = []
        with (self.folder / file).open("wb", buffering=0) as out:
            header = safetensors_header(tensors)
            digest.update(header)
            _write_all(out.fileno(), header)
            for tensor, content in zip(tensors, contents, strict=True):
                view = memoryview(content).cast("B")
                if len(view) != tensor.nbytes:
                    raise StoreError(f"{tensor.name} has {len(view)} bytes, not {tensor.nbytes}")
                digest.update(view)
                crcs.append(f"{zlib.crc32(view):08x}")
                _write_all(out.fileno(), view)
            os.fsync(out.fileno())
        return ResidentFile(file, tuple(tensors), digest.hexdigest(), "".join(crcs))

    def layer(self, layout: LayerLayout) -> LayerWriter:
        """Open one layer's file for writing its components in any order."""
        writer = LayerWriter(self.folder / layout.file, layout)
        self._layers.append(writer)
        return writer

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
            os.fsync(file.fileno())
        return sha256_file(target)

    def commit(self, manifest: Manifest) -> None:
        """Put the manifest in place: from now on the store is complete."""
        pending = self.folder / (MANIFEST_NAME + ".part")
        with pending.open("w") as out:
            out.write(to_json(manifest))
            out.flush()
            os.fsync(out.fileno())
        _sync_folder(self.folder / "experts")
        _sync_folder(self.folder)
        pending.replace(self.folder / MANIFEST_NAME)
        _sync_folder(self.folder)
        (self.folder / LOCK_NAME).unlink()


class LayerWriter:
    """One layer file, filled component by component so that a projection is all it needs."""

    def __init__(self, path: Path, layout: LayerLayout) -> None:
        self._path = path
        self._layout = layout
        self._crcs: dict[str, list[str]] = {}
        self._file = path.open("w+b", buffering=0)
        try:
            self._file.truncate(layout.file_bytes)
            _write_all(self._file.fileno(), layout.header)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Give the file back; closing twice is fine."""
        self._file.close()

    def write(self, component: Component, content: Bytes) -> None:
        """Scatter a component of all experts, `[n_experts, *component.shape]` row-contiguous."""
        view = memoryview(content).cast("B")
        size = component.nbytes
        if len(view) != size * self._layout.n_experts:
            raise StoreError(
                f"{self._layout.path}.{component.name} has {len(view)} bytes, "
                f"not {self._layout.n_experts} times {size}"
            )
        crcs = []
        for expert in range(self._layout.n_experts):
            part = view[expert * size : (expert + 1) * size]
            crcs.append(f"{zlib.crc32(part):08x}")
            offset = self._layout.record_offset(expert) + component.offset
            while part:
                written = os.pwrite(self._file.fileno(), part, offset)
                part, offset = part[written:], offset + written
        self._crcs[component.name] = crcs

    def finish(self) -> LayerFile:
        """Hash and close the file; every component must have been written."""
        columns = [self._crcs[c.name] for c in self._layout.record.components]
        crc32 = "".join(crc for record in zip(*columns, strict=True) for crc in record)
        self._file.seek(0)
        digest = hashlib.sha256()
        while chunk := self._file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
        os.fsync(self._file.fileno())
        self._file.close()
        return LayerFile(self._layout, digest.hexdigest(), crc32)


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


def _journal(folder: Path) -> list[str]:
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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
