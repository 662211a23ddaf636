"""Safetensors headers of a checkpoint, read and checked without touching tensor data."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from flashmoe.errors import SourceError

MAX_HEADER_BYTES = 100 * 2**20


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


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file by name.

    Raises SourceError when the file is truncated or is not valid safetensors.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8):
                raise SourceError(
                    f"{path} is not a whole safetensors file (header of {length} bytes in a "
                    f"file of {file_bytes}); download it again"
                )
            entries = json.loads(file.read(length))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} has a header that is not JSON: {error}") from None
    start = 8 + length
    tensors = {}
    try:
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            shape = tuple(int(n) for n in entry["shape"])
            tensors[name] = TensorInfo(str(entry["dtype"]), shape, start + begin, start + end)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise SourceError(f"{path} has a malformed safetensors header") from None
    last = max((tensor.end for tensor in tensors.values()), default=start)
    if last > file_bytes:
        raise SourceError(
            f"{path} is truncated: its tensors end at {last} but the file has {file_bytes} "
            "bytes; download it again"
        )
    return tensors
