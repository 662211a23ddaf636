"""Safetensors headers of a checkpoint, read and checked without touching tensor data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from flashmoe.base.errors import SourceError

MAX_HEADER_BYTES = 100 * 2**20
MAX_RANK = 8
# Every dtype of safetensors, those without an MLX counterpart included.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint file; `begin` and `end` are offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file by name.

    Raises SourceError when the file is truncated or is not valid safetensors.
    """
    try:
        with path.open("rb") as file:

            def read(offset: int, size_bytes: int) -> bytes:
                file.seek(offset)
                return file.read(size_bytes)

            return parse_header(str(path), path.stat().st_size, read)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None


def parse_header(
    path: str, file_bytes: int, read: Callable[[int, int], bytes]
) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file of `file_bytes`, of which `read(offset, size_bytes)`
    gives any part; two are asked for.

    Raises SourceError, which names `path`, when that is not valid safetensors.
    """
    length = int.from_bytes(read(0, 8), "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8):
        raise SourceError(
            f"{path} is not a whole safetensors file (header of {length} bytes in a "
            f"file of {file_bytes}); download it again"
        )
    try:
        entries = json.loads(read(8, length), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} has a header that is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise SourceError(f"{path} has a malformed safetensors header")
    start = 8 + length
    tensors = {}
    for name, entry in entries.items():
        if name != "__metadata__":
            tensor = _tensor(entry, start)
            if tensor is None:
                raise SourceError(f"{path} has a malformed safetensors header at {name[:100]!r}")
            tensors[name] = tensor
    last = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.end)):
        if tensor.begin < last:
            raise SourceError(f"{path} has a malformed safetensors header: tensors overlap")
        last = tensor.end
    if last > file_bytes:
        raise SourceError(
            f"{path} is truncated: its tensors end at {last} but the file has {file_bytes} "
            "bytes; download it again"
        )
    return tensors


def _tensor(entry: object, start: int) -> TensorInfo | None:
    """One entry of a header, or None unless it is exactly what safetensors writes."""
    if not isinstance(entry, dict):
        return None
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return None
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        return None
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        return None
    return TensorInfo(dtype, tuple(shape), start + begin, start + end)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > MAX_RANK:
        return False
    return all(type(n) is int and 0 <= n < 2**60 for n in value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is stated twice")
    return table
