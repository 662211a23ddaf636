"""The manifest: what a store holds, as one JSON file that is written last.

Its presence means that the store is complete.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from flashmoe.store.layout import LayerLayout, Quantization, TensorSpec, safetensors_header

MANIFEST_NAME = "flashmoe.json"
LOCK_NAME = "repack.lock"
JOURNAL_NAME = "repack.journal"
FORMAT = "flashmoe"
VERSION = 1


@dataclass(frozen=True)
class Source:
    """Where a store came from: Hub id or folder name, revision, SHA-256 of each file."""

    repo: str
    revision: str | None
    files: dict[str, str]


@dataclass(frozen=True)
class ResidentFile:
    """One safetensors file of resident tensors, back to back in this order.

    `crc32` has 8 hex digits per tensor; it locates damage that `sha256` reveals.
    """

    file: str
    tensors: tuple[TensorSpec, ...]
    sha256: str
    crc32: str

    @property
    def header(self) -> bytes:
        return safetensors_header(self.tensors)

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class LayerFile:
    """A layer's layout with its checksums; `crc32` has 8 hex digits per component per expert."""

    layout: LayerLayout
    sha256: str
    crc32: str


@dataclass(frozen=True)
class Manifest:
    """Everything a reader must know; `quantization` covers the resident modules by path,
    `copied` maps the names of files copied from the source to their SHA-256."""

    model_type: str
    parameters: int
    source: Source
    quantization: dict[str, Quantization]
    resident: tuple[ResidentFile, ...]
    layers: tuple[LayerFile, ...]
    copied: dict[str, str]

    @property
    def resident_bytes(self) -> int:
        return sum(shard.tensor_bytes for shard in self.resident)

    @property
    def streamed_bytes(self) -> int:
        return sum(layer.layout.n_experts * layer.layout.record.stride for layer in self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Record bytes that one token routes to, over all layers."""
        return sum(layer.layout.top_k * layer.layout.record.stride for layer in self.layers)


def to_json(manifest: Manifest) -> str:
    """The manifest's text; equal manifests give equal bytes."""

    def packing(table: dict[str, Quantization]) -> dict[str, Any]:
        return {
            path: {"bits": q.bits, "group_size": q.group_size, "mode": q.mode}
            for path, q in table.items()
        }

    document = {
        "format": FORMAT,
        "version": VERSION,
        "model_type": manifest.model_type,
        "parameters": manifest.parameters,
        "source": {
            "repo": manifest.source.repo,
            "revision": manifest.source.revision,
            "files": manifest.source.files,
        },
        "copied": manifest.copied,
        "quantization": packing(manifest.quantization),
        "resident": [
            {
                "file": shard.file,
                "sha256": shard.sha256,
                "crc32": shard.crc32,
                "tensors": [
                    {"name": t.name, "dtype": t.dtype, "shape": list(t.shape)}
                    for t in shard.tensors
                ],
            }
            for shard in manifest.resident
        ],
        "layers": [
            {
                "path": layer.layout.path,
                "kind": layer.layout.kind,
                "file": layer.layout.file,
                "n_experts": layer.layout.n_experts,
                "top_k": layer.layout.top_k,
                "stride": layer.layout.record.stride,
                "projections": packing(layer.layout.projections),
                "components": [
                    {"name": c.name, "dtype": c.dtype, "shape": list(c.shape), "offset": c.offset}
                    for c in layer.layout.record.components
                ],
                "sha256": layer.sha256,
                "crc32": layer.crc32,
            }
            for layer in manifest.layers
        ],
    }
    return json.dumps(document, indent=1) + "\n"
