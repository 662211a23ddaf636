"""A checkpoint of full apparent size that takes a hundredth of it on a disk.

What is resident is random, as in `make_synthetic.py`. Of each expert's matrices only a
few rows are, a different stretch for each expert and layer; the rest are holes. Repacked, moved or
read at a wrong place, an expert does not give what it should.

Either as mlx-lm converts (`plan_sparse`), or as Qwen3.5 is published (`as_published`): bfloat16,
gate and up fused to one tensor per layer, with the layer that predicts a second token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from flashmoe.base.dtypes import MLX_DTYPES, array_bytes
from flashmoe.checkpoint.architecture import build_model, expert_modules, projections_of
from flashmoe.checkpoint.config import Config
from flashmoe.store.layout import TensorSpec
from tests.support.synthetic.checkpoint import CheckpointPlan, plan_checkpoint
from tests.support.synthetic.weights import (
    Constant,
    Fill,
    Kept,
    Normal,
    PlannedTensor,
    SyntheticTensor,
)

# Rows of the last projection, which every value inside an expert goes through.
LAST_ROWS = 8
# They add up one value each instead of a row's, so they are made larger.
LAST_GAIN = 256.0
# Coprime to the numbers of rows that experts have, so that neighbours are far apart.
ROW_STEP = 37
# Of resident matrices in bfloat16 that are larger, one of so many shares is filled.
LARGE_BYTES = 16 * 2**20
LARGE_SHARES = 8
# What mlx-lm adds one to.
CENTRED = re.compile(r"(input_layernorm|post_attention_layernorm|model\.norm|[qk]_norm)\.weight$")


@dataclass(frozen=True)
class StampedTensor:
    """Matrices [n_experts, n_rows, ...] of which `rows` rows are filled, from row
    `first + ROW_STEP * expert` on, over again `every` rows, in one of `expert_step` experts; all
    else is a hole."""

    spec: TensorSpec
    fill: Fill
    seed: int
    rows: int
    first: int
    every: int
    expert_step: int

    @property
    def written_bytes(self) -> int:
        n_experts, n_rows = self.spec.shape[:2]
        return (
            -(-n_experts // self.expert_step) * (n_rows // self.every) * self.rows * self._row_bytes
        )

    @property
    def _row_bytes(self) -> int:
        return self.spec.nbytes // (self.spec.shape[0] * self.spec.shape[1])

    def pieces(self) -> Iterator[tuple[int, Any]]:
        rng = SyntheticTensor(self.spec, self.fill, self.seed).generator()
        n_experts, n_rows = self.spec.shape[:2]
        size_bytes = self.rows * self._row_bytes
        for expert in range(self.first % self.expert_step, n_experts, self.expert_step):
            row = (self.first + ROW_STEP * expert) % (self.every - self.rows + 1)
            for begin in range(expert * n_rows + row, (expert + 1) * n_rows, self.every):
                yield begin * self._row_bytes, self.fill.piece(rng, 0, size_bytes)


@dataclass(frozen=True)
class FirstRows:
    """A tensor of which only the first of `shares` equal parts is filled."""

    spec: TensorSpec
    fill: Fill
    seed: int
    shares: int

    @property
    def written_bytes(self) -> int:
        return self.spec.nbytes // self.shares

    def pieces(self) -> Iterator[tuple[int, Any]]:
        n_rows, *rest = self.spec.shape
        part = replace(self.spec, shape=(n_rows // self.shares, *rest))
        return SyntheticTensor(part, self.fill, self.seed).pieces()


@dataclass(frozen=True)
class Hole:
    """A tensor of zeros."""

    spec: TensorSpec
    written_bytes: int = 0

    def pieces(self) -> Iterator[tuple[int, Any]]:
        return iter(())


def plan_sparse(
    config: Config,
    *,
    layers: int | None = None,
    bits: int | None = None,
    expert_step: int = 1,
    seed: int = 0,
) -> CheckpointPlan:
    """`plan_checkpoint` with stamped experts; 16 bits for bfloat16. Of a larger `expert_step`, so
    many experts have one that is no hole altogether; the number of experts must be a multiple."""
    plan = plan_checkpoint(config, layers=layers, bits=bits, seed=seed)
    model, _ = build_model(plan.config)
    places: dict[str, tuple[int, bool]] = {}
    for number, (path, module) in enumerate(expert_modules(model).items()):
        *others, last = projections_of(module)
        places |= {f"{path}.{name}": (number, False) for name in others}
        places[f"{path}.{last}"] = (number, True)
    tensors = tuple(
        _stamped(tensor, *places[path], expert_step) if path in places else tensor
        for tensor in plan.tensors
        for path in [tensor.spec.name.rpartition(".")[0]]
    )
    return replace(plan, tensors=tensors)


def _stamped(tensor: SyntheticTensor, layer: int, last: bool, expert_step: int) -> StampedTensor:
    fill = _amplified(tensor) if last else tensor.fill
    n_rows = tensor.spec.shape[1]
    rows = min(LAST_ROWS, n_rows) if last else 1
    return StampedTensor(tensor.spec, fill, tensor.seed, rows, layer, n_rows, expert_step)


def _amplified(tensor: SyntheticTensor) -> Fill:
    fill = tensor.fill
    if isinstance(fill, Normal):
        return replace(fill, spread=LAST_GAIN * fill.spread)
    if isinstance(fill, Constant):
        element = mx.array(list(fill.element), mx.uint8).view(MLX_DTYPES[tensor.spec.dtype])
        return Constant(bytes(array_bytes((LAST_GAIN * element).astype(element.dtype))))
    return fill


def as_published(plan: CheckpointPlan, large_bytes: int = LARGE_BYTES) -> CheckpointPlan:
    """A plan of 16 bits with the tensors that Qwen's own checkpoint has, less the vision tower.

    Of resident matrices above `large_bytes`, only a part is kept: of the embeddings, those of the
    first tokens.
    """
    tensors: list[PlannedTensor] = []
    for tensor in plan.tensors:
        name, shape = tensor.spec.name, tensor.spec.shape
        if name.endswith("up_proj.weight") and isinstance(tensor, StampedTensor):
            continue
        if isinstance(tensor, SyntheticTensor) and tensor.spec.nbytes > large_bytes:
            tensor = FirstRows(tensor.spec, tensor.fill, tensor.seed, LARGE_SHARES)
        if CENTRED.search(name):
            tensor = replace(tensor, fill=Kept(bytes(tensor.spec.nbytes)))
        if name.endswith(".switch_mlp.gate_proj.weight"):
            name = name.replace("switch_mlp.gate_proj.weight", "experts.gate_up_proj")
            shape = (shape[0], 2 * shape[1], shape[2])
        if name.endswith("conv1d.weight"):
            shape = (shape[0], shape[2], shape[1])
        name = name.replace("switch_mlp.down_proj.weight", "experts.down_proj")
        name = name.replace("language_model.model.", "model.language_model.")
        spec = replace(tensor.spec, name=name.removeprefix("language_model."), shape=shape)
        tensors.append(replace(tensor, spec=spec))
    return replace(plan, tensors=(*tensors, *_second_token_layer(tensors)))


def _second_token_layer(tensors: Iterable[PlannedTensor]) -> Iterator[Hole]:
    """The tensors of Qwen's `mtp` part, a layer of full attention with a tensor for each expert's
    matrices, which mlx-lm leaves out."""
    specs: Mapping[str, TensorSpec] = {tensor.spec.name: tensor.spec for tensor in tensors}
    layer = next(name for name in specs if "self_attn" in name).partition(".self_attn")[0]
    dtype = specs["lm_head.weight"].dtype
    width = specs["lm_head.weight"].shape[1]
    yield Hole(TensorSpec("mtp.fc.weight", dtype, (width, 2 * width)))
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield Hole(TensorSpec(f"mtp.{name}.weight", dtype, (width,)))
    for name, spec in specs.items():
        if not name.startswith(f"{layer}."):
            continue
        own = name.replace(layer, "mtp.layers.0")
        if ".experts." not in own:
            yield Hole(TensorSpec(own, dtype, spec.shape))
            continue
        prefix, _, fused = own.rpartition(".")
        for expert in range(spec.shape[0]):
            for part in ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",):
                n_rows = spec.shape[1] // (2 if fused == "gate_up_proj" else 1)
                shape = (n_rows, spec.shape[2])
                yield Hole(TensorSpec(f"{prefix}.{expert}.{part}.weight", dtype, shape))
