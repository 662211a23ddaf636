"""A summary of a store, from its manifest alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashmoe.store.layout import LayerLayout
from flashmoe.store.manifest import Source
from flashmoe.store.reader import open_store


@dataclass(frozen=True)
class LayerSummary:
    """One MoE layer; `packing` maps each projection to its packing, such as "4-bit affine/64"."""

    path: str
    experts: int
    top_k: int
    record_bytes: int
    padding_bytes: int
    packing: dict[str, str]


@dataclass(frozen=True)
class StoreSummary:
    """What a store holds, sizes in bytes.

    `token_bytes` are the record bytes that one token routes to; `resident_packing` counts the
    resident quantized modules by packing.
    """

    path: str
    model_type: str
    source: Source
    parameters: int
    records: int
    resident_bytes: int
    streamed_bytes: int
    token_bytes: int
    resident_packing: dict[str, int]
    layers: tuple[LayerSummary, ...]


def inspect(store: str | Path) -> StoreSummary:
    """Summarise a store without reading its data.

    Raises StoreError when it is not a complete store.
    """
    opened = open_store(store)
    manifest = opened.manifest
    resident: dict[str, int] = {}
    for q in manifest.quantization.values():
        name = _packing_name(q.bits, q.mode, q.group_size)
        resident[name] = resident.get(name, 0) + 1
    return StoreSummary(
        path=str(opened.path),
        model_type=manifest.model_type,
        source=manifest.source,
        parameters=manifest.parameters,
        records=sum(layer.layout.n_experts for layer in manifest.layers),
        resident_bytes=manifest.resident_bytes,
        streamed_bytes=manifest.streamed_bytes,
        token_bytes=manifest.bytes_per_token,
        resident_packing=resident,
        layers=tuple(_summarise(layer.layout) for layer in manifest.layers),
    )


def _summarise(layout: LayerLayout) -> LayerSummary:
    packing = {}
    for component in layout.record.components:
        name, _, part = component.name.partition(".")
        if part == "weight":
            q = layout.projections.get(name)
            packing[name] = (
                component.dtype if q is None else _packing_name(q.bits, q.mode, q.group_size)
            )
    return LayerSummary(
        path=layout.path,
        experts=layout.n_experts,
        top_k=layout.top_k,
        record_bytes=layout.record.stride,
        padding_bytes=layout.record.stride - layout.record.payload_bytes,
        packing=packing,
    )


def _packing_name(bits: int, mode: str, group_size: int) -> str:
    return f"{bits}-bit {mode}/{group_size}"
