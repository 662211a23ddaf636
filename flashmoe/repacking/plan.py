"""What a repack will write: pure, printable, and known before a byte of weights is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters

from flashmoe.base.dtypes import dtype_name
from flashmoe.base.errors import SourceError
from flashmoe.checkpoint.architecture import (
    PROJECTION_TYPES,
    Routing,
    build_resident,
    expert_modules,
    kind_of,
    n_experts_of,
    projections_of,
)
from flashmoe.checkpoint.config import Config
from flashmoe.repacking.model_parts import Parts
from flashmoe.repacking.recipe import Setting
from flashmoe.store.layout import LayerLayout, Quantization, TensorSpec, lay_out_record

SHARD_BYTES = 2 * 2**30
# Within a projection, in this order; a record never holds others.
COMPONENT_ORDER = ("weight", "scales", "biases", "global_scale", "bias")


@dataclass(frozen=True)
class ShardPlan:
    """One resident file: tensors back to back in this order."""

    file: str
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class RepackPlan:
    """Every file of the store to be, with the packing of each resident quantized module and the
    part of the model (a key of `recipe.PARTS`) that each module belongs to. `settings` has how
    each weight is packed that the source has as floats, by module path."""

    model_type: str
    parameters: int
    layers: tuple[LayerLayout, ...]
    resident: tuple[ShardPlan, ...]
    quantization: dict[str, Quantization]
    parts: dict[str, str]
    settings: dict[str, Setting]

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data, which progress is counted in."""
        records = sum(layer.n_experts * layer.record.payload_bytes for layer in self.layers)
        return records + sum(t.nbytes for shard in self.resident for t in shard.tensors)

    @property
    def file_bytes(self) -> int:
        """Bytes on disk, small copied files aside."""
        records = sum(layer.file_bytes for layer in self.layers)
        return records + sum(t.nbytes for shard in self.resident for t in shard.tensors)


def plan_repack(
    model: nn.Module, config: Config, routing: Routing, settings: Mapping[str, Setting]
) -> RepackPlan:
    """Plan the store of a lazily loaded (and, as `settings` say, lazily quantized) model.

    Raises SourceError when the model has no routed experts, or when the store would not hold
    exactly the tensors that loading it will ask for.
    """
    experts = expert_modules(model)
    if not experts:
        raise SourceError(
            f"{config['model_type']} has no routed experts; flashmoe streams "
            "mixture-of-experts models only"
        )
    layers = tuple(
        _plan_layer(index, path, module, routing.top_k[path])
        for index, (path, module) in enumerate(experts.items())
    )
    streamed = {f"{layer.path}.{c.name}" for layer in layers for c in layer.record.components}
    resident = [
        TensorSpec(name, dtype_name(array.dtype), tuple(array.shape))
        for name, array in tree_flatten(model.parameters())
        if name not in streamed
    ]
    plan = RepackPlan(
        model_type=config["model_type"],
        parameters=int(get_total_parameters(model)),
        layers=layers,
        resident=_shards(resident),
        quantization=_resident_quantization(model, experts),
        parts=_parts(model),
        settings={path: s for path, s in settings.items() if not s.is_float},
    )
    _check_loadable(plan, config)
    return plan


def _plan_layer(index: int, path: str, module: nn.Module, top_k: int) -> LayerLayout:
    n_experts = n_experts_of(module)
    tensors: list[TensorSpec] = []
    packing: dict[str, Quantization] = {}
    for name, projection in projections_of(module).items():
        arrays = dict(tree_flatten(projection.parameters()))
        unknown = set(arrays) - set(COMPONENT_ORDER)
        if unknown:
            raise SourceError(f"{path}.{name} has a tensor {unknown.pop()!r} that records lack")
        for part in COMPONENT_ORDER:
            if part in arrays:
                array: mx.array = arrays[part]
                if array.shape[0] != n_experts:
                    raise SourceError(
                        f"{path}.{name}.{part} is for {array.shape[0]} experts, not {n_experts}"
                    )
                tensors.append(
                    TensorSpec(f"{name}.{part}", dtype_name(array.dtype), tuple(array.shape[1:]))
                )
        if "scales" in arrays:
            packing[name] = _packing_of(projection)
    return LayerLayout(
        path=path,
        kind=kind_of(module),
        file=f"experts/layer-{index:03d}.safetensors",
        n_experts=n_experts,
        top_k=min(top_k, n_experts),
        record=lay_out_record(tensors),
        projections=packing,
    )


def _packing_of(module: nn.Module) -> Quantization:
    return Quantization(module.bits, module.group_size, getattr(module, "mode", "affine"))


def _parts(model: nn.Module) -> dict[str, str]:
    parts = Parts(model)
    return {path: parts.of(path) for path, _ in model.named_modules()}


def _resident_quantization(
    model: nn.Module, experts: dict[str, nn.Module]
) -> dict[str, Quantization]:
    return {
        path: _packing_of(module)
        for path, module in model.named_modules()
        if "scales" in module
        and not (isinstance(module, PROJECTION_TYPES) and path.rpartition(".")[0] in experts)
    }


def _shards(tensors: list[TensorSpec]) -> tuple[ShardPlan, ...]:
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return tuple(
        ShardPlan(f"resident-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for i, group in enumerate(groups, start=1)
    )


def _check_loadable(plan: RepackPlan, config: Config) -> None:
    model = build_resident(config, plan.quantization)
    wanted = {name: tuple(a.shape) for name, a in tree_flatten(model.parameters())}
    planned = {t.name: t.shape for shard in plan.resident for t in shard.tensors}
    for name in sorted(wanted.keys() | planned.keys()):
        if wanted.get(name) != planned.get(name):
            raise SourceError(
                f"{name} would be stored as {planned.get(name)} but loading a "
                f"{plan.model_type} needs {wanted.get(name)}; this checkpoint cannot be repacked"
            )
