"""Opening a store: every file present, of the right size, with the header it must have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashmoe.base.errors import StoreError
from flashmoe.store.manifest import LOCK_NAME, MANIFEST_NAME, Manifest
from flashmoe.store.parse import load_manifest


@dataclass(frozen=True)
class Store:
    """A complete store on disk whose structure has been checked (its content has not)."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        return self.path / name


def is_store(folder: Path) -> bool:
    """Whether a folder says it is a complete store."""
    return (folder / MANIFEST_NAME).is_file()


def is_incomplete(folder: Path) -> bool:
    """Whether a folder is what an interrupted repack left, or one that is still running."""
    return (folder / LOCK_NAME).is_file() and not is_store(folder)


def open_store(folder: str | Path) -> Store:
    """Open a store and check its structure against the manifest without reading its data.

    Raises StoreError when a file is missing, has another size than the manifest implies, or
    starts with another header.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    for name in manifest.copied:
        if not (folder / name).is_file():
            raise StoreError(f"{folder / name} is missing; repack the model")
    for shard in manifest.resident:
        header = shard.header
        _check_file(folder / shard.file, header, len(header) + shard.tensor_bytes)
    for layer in manifest.layers:
        _check_file(folder / layer.layout.file, layer.layout.header, layer.layout.file_bytes)
    return Store(folder, manifest)


def _check_file(path: Path, header: bytes, size_bytes: int) -> None:
    try:
        actual = path.stat().st_size
        if actual != size_bytes:
            raise StoreError(
                f"{path} has {actual} bytes where the manifest implies {size_bytes}; "
                "repack the model"
            )
        with path.open("rb") as file:
            found = file.read(len(header))
    except OSError as error:
        raise StoreError(f"{path} cannot be opened: {error.strerror}") from None
    if found != header:
        offset = next(i for i, (a, b) in enumerate(zip(found, header, strict=True)) if a != b)
        raise StoreError(
            f"{path} is damaged: its header differs at offset {offset} from the one that the "
            "manifest implies; repack the model"
        )
