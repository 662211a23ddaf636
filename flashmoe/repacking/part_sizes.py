"""How large each part of a store will be, and how it is packed."""

from __future__ import annotations

from dataclasses import dataclass, field

from flashmoe.repacking.plan import RepackPlan
from flashmoe.repacking.recipe import PARTS
from flashmoe.store.layout import Quantization


@dataclass
class PartSize:
    """One part of a model, a key of `recipe.PARTS`: bytes of its tensors, and how many of its
    matrices are packed how, as in "4-bit affine/64"."""

    part: str
    bytes: int = 0
    packing: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedSizes:
    """Sizes of a store to be, in bytes.

    `streamed_bytes` are those of the records, which have padding that the parts have not;
    `token_bytes` of them are what one token routes to.
    """

    model_type: str
    parameters: int
    resident_bytes: int
    streamed_bytes: int
    token_bytes: int
    file_bytes: int
    parts: tuple[PartSize, ...]


def sizes_of(plan: RepackPlan) -> PlannedSizes:
    """The sizes of every part that a plan has, those of the experts per projection."""
    parts = {part: PartSize(part) for part in PARTS}
    for layer in plan.layers:
        for component in layer.record.components:
            path = f"{layer.path}.{component.projection}"
            part = parts[plan.parts[path]]
            part.bytes += layer.n_experts * component.nbytes
            if component.name.endswith(".weight"):
                _count(part, layer.projections.get(component.projection), layer.n_experts)
    for tensor in (tensor for shard in plan.resident for tensor in shard.tensors):
        path = tensor.name.rpartition(".")[0]
        part = parts[plan.parts.get(path, "resident")]
        part.bytes += tensor.nbytes
        if tensor.name.endswith(".weight") and len(tensor.shape) > 1:
            _count(part, plan.quantization.get(path), 1)
    streamed = [(layer.record.stride, layer) for layer in plan.layers]
    return PlannedSizes(
        model_type=plan.model_type,
        parameters=plan.parameters,
        resident_bytes=sum(t.nbytes for shard in plan.resident for t in shard.tensors),
        streamed_bytes=sum(stride * layer.n_experts for stride, layer in streamed),
        token_bytes=sum(stride * layer.top_k for stride, layer in streamed),
        file_bytes=plan.file_bytes,
        parts=tuple(part for part in parts.values() if part.bytes),
    )


def _count(part: PartSize, packing: Quantization | None, matrices: int) -> None:
    name = f"{packing.bits}-bit {packing.mode}/{packing.group_size}" if packing else "floats"
    part.packing[name] = part.packing.get(name, 0) + matrices
