"""Strict reading of a manifest.

A version, a field or a number that this code does not understand is refused, and nothing is
sized from a manifest before every bound has been checked.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from flashmoe.base.errors import StoreError
from flashmoe.store.layout import (
    COMPONENT_ALIGN_BYTES,
    DTYPE_BYTES,
    PAGE_BYTES,
    Component,
    LayerLayout,
    Quantization,
    RecordLayout,
    TensorSpec,
)
from flashmoe.store.manifest import (
    FORMAT,
    MANIFEST_NAME,
    VERSION,
    LayerFile,
    Manifest,
    ResidentFile,
    Source,
)

# Several times what the largest models need (2 MB for 60 layers of 512 experts).
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_RANK = 8
MAX_NAME_LENGTH = 128
MAX_BITS = 32
MAX_GROUP_SIZE = 1024
MAX_DIMENSION = 2**40
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
KINDS = ("SwitchGLU", "SwitchMLP")


def load_manifest(folder: Path) -> Manifest:
    """Read and check `folder`'s manifest.

    Raises StoreError when there is none, or when anything in it is not exactly as this
    version writes it.
    """
    path = folder / MANIFEST_NAME
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"{path} is not a file; {folder} is not a flashmoe store")
        if status.st_size > MAX_MANIFEST_BYTES:
            raise StoreError(f"{path} is larger than any manifest; it is not a flashmoe store")
        document = json.loads(path.read_bytes(), object_pairs_hook=_object)
    except FileNotFoundError:
        raise StoreError(
            f"{folder} is not a complete flashmoe store (no {MANIFEST_NAME}); "
            "run flashmoe repack to make one"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read as JSON: {error}") from None
    return from_document(document, str(path))


def from_document(document: Any, where: str) -> Manifest:
    """Build a Manifest from parsed JSON; `where` names the file in errors."""
    top = _Fields(document, where)
    if top.take("format", _text) != FORMAT:
        raise StoreError(f"{where} is not a flashmoe manifest")
    version = top.take("version", _count)
    if version != VERSION:
        raise StoreError(
            f"{where} has store version {version} but this flashmoe reads version {VERSION}; "
            "upgrade flashmoe or repack the model"
        )
    source = _Fields(top.take("source", _any), f"{where}: source")
    manifest = Manifest(
        model_type=top.take("model_type", _text),
        parameters=top.take("parameters", _count),
        source=Source(
            source.take("repo", _text),
            source.take("revision", lambda v, w: None if v is None else _text(v, w)),
            source.take("files", _digests),
        ),
        copied=top.take("copied", _digests),
        quantization=top.take("quantization", _packing),
        resident=tuple(_list(top.take("resident", _any), f"{where}: resident", _resident_file)),
        layers=tuple(_list(top.take("layers", _any), f"{where}: layers", _layer_file)),
    )
    source.done()
    top.done()
    if not manifest.layers:
        raise StoreError(f"{where}: layers must not be empty")
    files = [s.file for s in manifest.resident] + [layer.layout.file for layer in manifest.layers]
    files += list(manifest.copied)
    _distinct(files, f"{where}: file names")
    for name in files:
        _safe_file(name, where)
    _distinct([t.name for s in manifest.resident for t in s.tensors], f"{where}: tensor names")
    _distinct([layer.layout.path for layer in manifest.layers], f"{where}: layer paths")
    if "config.json" not in manifest.copied:
        raise StoreError(f"{where}: copied files lack config.json")
    return manifest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key stated twice would mean two things to two readers."""
    _distinct([name for name, _ in pairs], f"the keys of {MANIFEST_NAME}")
    return dict(pairs)


class _Fields:
    """A JSON object taken apart field by field; leftovers are an error."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise StoreError(f"{where} must be a JSON object")
        self._rest = dict(value)
        self.where = where

    def take(self, name: str, convert: Callable[[Any, str], Any]) -> Any:
        if name not in self._rest:
            raise StoreError(f"{self.where} lacks the field {name!r}")
        return convert(self._rest.pop(name), f"{self.where}: {name}")

    def done(self) -> None:
        if self._rest:
            raise StoreError(
                f"{self.where} has the unknown field {next(iter(self._rest))!r}; "
                "it was written by a newer flashmoe"
            )


def _any(value: Any, where: str) -> Any:
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise StoreError(f"{where} must be a non-empty string")
    return value


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 2**62:
        raise StoreError(f"{where} must be a whole number from 0 to 2^62")
    return value


def _positive(value: Any, where: str) -> int:
    if not 1 <= _count(value, where) <= MAX_DIMENSION:
        raise StoreError(f"{where} must be from 1 to 2^40")
    return int(value)


def _bits(value: Any, where: str) -> int:
    if _positive(value, where) > MAX_BITS:
        raise StoreError(f"{where} must be at most {MAX_BITS}")
    return int(value)


def _group_size(value: Any, where: str) -> int:
    if _positive(value, where) > MAX_GROUP_SIZE:
        raise StoreError(f"{where} must be at most {MAX_GROUP_SIZE}")
    return int(value)


def _shape(value: Any, where: str) -> tuple[int, ...]:
    if isinstance(value, list) and len(value) > MAX_RANK:
        raise StoreError(f"{where} has {len(value)} dimensions, more than {MAX_RANK}")
    shape = tuple(_list(value, where, _count))
    if any(n > MAX_DIMENSION for n in shape) or math.prod(shape) > 2**50:
        raise StoreError(f"{where} {shape} is too large for any tensor")
    return shape


def _list(value: Any, where: str, convert: Callable[[Any, str], Any]) -> list[Any]:
    if not isinstance(value, list):
        raise StoreError(f"{where} must be a JSON array")
    return [convert(item, f"{where}[{i}]") for i, item in enumerate(value)]


def _sha256(value: Any, where: str) -> str:
    if not isinstance(value, str) or re.fullmatch(r"[0-9a-f]{64}", value) is None:
        raise StoreError(f"{where} must be a SHA-256 in hex")
    return value


def _digests(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise StoreError(f"{where} must be a JSON object")
    return {name: _sha256(digest, f"{where}: {name}") for name, digest in value.items()}


def _crc32(value: Any, where: str, count: int) -> str:
    if not isinstance(value, str) or re.fullmatch(r"[0-9a-f]*", value) is None:
        raise StoreError(f"{where} must be hex digits")
    if len(value) != 8 * count:
        raise StoreError(f"{where} has {len(value)} digits, not 8 for each of {count} parts")
    return value


def _packing(value: Any, where: str) -> dict[str, Quantization]:
    if not isinstance(value, dict):
        raise StoreError(f"{where} must be a JSON object")
    table = {}
    for path, item in value.items():
        fields = _Fields(item, f"{where}: {path}")
        mode = fields.take("mode", _text)
        if mode not in MODES:
            raise StoreError(f"{fields.where}: mode {mode!r} is unknown; known are {MODES}")
        table[path] = Quantization(
            fields.take("bits", _bits), fields.take("group_size", _group_size), mode
        )
        fields.done()
    return table


def _tensor(fields: _Fields) -> TensorSpec:
    name = fields.take("name", _text)
    dtype = fields.take("dtype", _text)
    if dtype not in DTYPE_BYTES:
        raise StoreError(f"{fields.where}: dtype {dtype!r} is unknown")
    if name == "__metadata__":
        raise StoreError(f"{fields.where}: the name __metadata__ is reserved by safetensors")
    return TensorSpec(name, dtype, fields.take("shape", _shape))


def _resident_file(value: Any, where: str) -> ResidentFile:
    fields = _Fields(value, where)
    tensors = []
    for i, item in enumerate(_list(fields.take("tensors", _any), f"{where}: tensors", _any)):
        tensor = _Fields(item, f"{where}: tensors[{i}]")
        tensors.append(_tensor(tensor))
        tensor.done()
    shard = ResidentFile(
        file=fields.take("file", _text),
        tensors=tuple(tensors),
        sha256=fields.take("sha256", _sha256),
        crc32=fields.take("crc32", lambda v, w: _crc32(v, w, len(tensors))),
    )
    fields.done()
    return shard


def _layer_file(value: Any, where: str) -> LayerFile:
    fields = _Fields(value, where)
    components = []
    for i, item in enumerate(_list(fields.take("components", _any), f"{where}: components", _any)):
        part = _Fields(item, f"{where}: components[{i}]")
        tensor = _tensor(part)
        offset = part.take("offset", _count)
        part.done()
        components.append(Component(tensor.name, tensor.dtype, tensor.shape, offset))
    layout = LayerLayout(
        path=fields.take("path", _text),
        kind=fields.take("kind", _text),
        file=fields.take("file", _text),
        n_experts=fields.take("n_experts", _positive),
        top_k=fields.take("top_k", _positive),
        record=RecordLayout(tuple(components), fields.take("stride", _positive)),
        projections=fields.take("projections", _packing),
    )
    _check_layer(layout, where)
    layer = LayerFile(
        layout,
        sha256=fields.take("sha256", _sha256),
        crc32=fields.take("crc32", lambda v, w: _crc32(v, w, len(components) * layout.n_experts)),
    )
    fields.done()
    return layer


def _check_layer(layout: LayerLayout, where: str) -> None:
    record = layout.record
    if layout.kind not in KINDS:
        raise StoreError(f"{where}: kind {layout.kind!r} is unknown; known are {KINDS}")
    if not record.components:
        raise StoreError(f"{where} has no components")
    if layout.top_k > layout.n_experts:
        raise StoreError(f"{where}: top_k {layout.top_k} exceeds {layout.n_experts} experts")
    if record.stride % PAGE_BYTES:
        raise StoreError(f"{where}: stride {record.stride} is not a multiple of {PAGE_BYTES}")
    _distinct([component.name for component in record.components], f"{where}: component names")
    end = 0
    for component in record.components:
        if component.offset % COMPONENT_ALIGN_BYTES:
            raise StoreError(f"{where}: {component.name} does not start on 4 KiB")
        if component.offset < end:
            raise StoreError(f"{where}: {component.name} overlaps the component before it")
        end = component.end
    if end > record.stride:
        raise StoreError(f"{where}: components end at {end}, beyond the stride {record.stride}")


def _safe_file(name: str, where: str) -> None:
    path = PurePosixPath(name)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable()
    reserved = name in (".", MANIFEST_NAME)
    if unsafe or reserved or str(path) != name or len(name) > MAX_NAME_LENGTH:
        raise StoreError(f"{where}: the file name {name!r} is not a plain path inside the store")


def _distinct(names: list[str], where: str) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise StoreError(f"{where} repeat {name!r}")
        seen.add(name)
