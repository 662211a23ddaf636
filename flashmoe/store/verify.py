"""Re-hashing a whole store and naming the first thing that is wrong.

SHA-256 of each file decides; the per-tensor CRC-32s of the manifest then locate the damage.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flashmoe.base.errors import StoreError
from flashmoe.base.sparse_files import read_at
from flashmoe.store.manifest import LayerFile, ResidentFile
from flashmoe.store.reader import open_store
from flashmoe.store.writer import HASH_CHUNK_BYTES, sha256_file


@dataclass(frozen=True)
class VerifyReport:
    """What was found good."""

    files: int
    bytes: int


@dataclass(frozen=True)
class _Part:
    """A stretch of a file with its expected CRC-32."""

    name: str
    offset: int
    nbytes: int
    crc32: str


def verify(store: str | Path, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Hash every file of a store; `progress(done_bytes, total_bytes)` is called as it goes.

    Raises StoreError naming the first bad file and, inside it, the tensor and its offset.
    """
    opened = open_store(store)
    manifest = opened.manifest
    names = [*manifest.copied, *(s.file for s in manifest.resident)]
    names += [layer.layout.file for layer in manifest.layers]
    total = sum(opened.file(name).stat().st_size for name in names)
    done = 0

    def advance(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        if progress is not None:
            progress(done, total)

    for name, digest in manifest.copied.items():
        path = opened.file(name)
        if sha256_file(path) != digest:
            raise StoreError(f"{path} is damaged: its SHA-256 is not the manifest's")
        advance(path.stat().st_size)
    files: list[ResidentFile | LayerFile] = [*manifest.resident, *manifest.layers]
    for file in files:
        _verify_file(opened.file(_file_name(file)), file, advance)
    return VerifyReport(len(names), done)


def _file_name(file: ResidentFile | LayerFile) -> str:
    return file.file if isinstance(file, ResidentFile) else file.layout.file


def _verify_file(
    path: Path, file: ResidentFile | LayerFile, advance: Callable[[int], None]
) -> None:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as stream:
            chunk = memoryview(bytearray(HASH_CHUNK_BYTES))
            offset = 0
            while size_bytes := read_at(stream, chunk, offset):
                digest.update(chunk[:size_bytes])
                offset += size_bytes
                advance(size_bytes)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    if digest.hexdigest() == file.sha256:
        return
    parts = _resident_parts(file) if isinstance(file, ResidentFile) else _record_parts(file)
    with path.open("rb") as stream:
        for part in parts:
            stream.seek(part.offset)
            if f"{zlib.crc32(stream.read(part.nbytes)):08x}" != part.crc32:
                raise StoreError(
                    f"{path} is damaged: {part.name} at offset {part.offset} "
                    f"({part.nbytes} bytes) does not match its checksum; repack the model"
                )
    where = _damaged_padding(path, file) if isinstance(file, LayerFile) else None
    if where is not None:
        raise StoreError(f"{path} is damaged: padding at offset {where} is not zero")
    raise StoreError(f"{path} does not match its SHA-256 although every tensor in it does")


def _resident_parts(file: ResidentFile) -> Iterator[_Part]:
    offset = len(file.header)
    for i, tensor in enumerate(file.tensors):
        yield _Part(tensor.name, offset, tensor.nbytes, file.crc32[8 * i : 8 * i + 8])
        offset += tensor.nbytes


def _record_parts(file: LayerFile) -> Iterator[_Part]:
    layout = file.layout
    position = 0
    for expert in range(layout.n_experts):
        for component in layout.record.components:
            yield _Part(
                f"{layout.path} expert {expert} {component.name}",
                layout.record_offset(expert) + component.offset,
                component.nbytes,
                file.crc32[position : position + 8],
            )
            position += 8


def _damaged_padding(path: Path, file: LayerFile) -> int | None:
    layout = file.layout
    with path.open("rb") as stream:
        for expert in range(layout.n_experts):
            stream.seek(layout.record_offset(expert))
            record = stream.read(layout.record.stride)
            ends = [component.end for component in layout.record.components]
            starts = [component.offset for component in layout.record.components][1:]
            for end, start in zip(ends, [*starts, layout.record.stride], strict=True):
                padding = record[end:start]
                if padding.strip(b"\0"):
                    inside = len(padding) - len(padding.lstrip(b"\0"))
                    return layout.record_offset(expert) + end + inside
    return None
