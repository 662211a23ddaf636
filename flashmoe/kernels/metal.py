"""Routed experts through the Metal kernels, for the few rows of a decode step.

expert_gate_up: hidden[p] = activation(Wg x, Wu x) for every (token, chosen expert) pair p. With
N rows and d columns per matrix, a pair moves 2 * N * d * (bits + 32 / group_size) / 8 bytes of
weights (16-bit scales and biases), d activations and 4 N bytes of output, and takes 4 N d
operations. expert_down: y = score * (Wd hidden), summed over a token's experts or not: half the
weights and operations, 4 N bytes in, d activations out. Both are bound by bytes: at 4 bits an
H100 or an M3 Max could do ten times the operations that its memory can feed.

Qwen3.5-397B at 4 bits, group 64 (d 4096, N 1024, top-10): 47.3 MB and 168 M operations for
expert_gate_up, 23.6 MB and 84 M for expert_down, per token and layer; 60 layers make 4.26 GB, so
400 GB/s of memory allow 94 tokens/s for the experts alone. `roofline.traffic` computes these.

More rows go to one product per expert (`grouped`); what the kernels do not cover goes to the
reference: nvfp4, mxfp8, activations that `recognize` does not know, gate and up packed in
different ways, floats whose rows are not a multiple of 8.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe.kernels import grouped, reference
from flashmoe.kernels.activations import recognize
from flashmoe.kernels.contract import ExpertForward, ExpertSpec, Slots
from flashmoe.kernels.metal_launch import (
    ACTIVATIONS,
    NO_LIMIT,
    Launch,
    MatrixFormat,
    covers,
    down_launch,
    gate_up_launch,
)
from flashmoe.kernels.metal_source import build
from flashmoe.native import Activation

# Calls with more rows are a prompt's.
DECODE_TOKENS = 8

FLOATS = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}

# MLX hands arrays with fewer elements to a kernel in another address space.
LEAST_ELEMENTS = 8


def available() -> str | None:
    """Why the kernels cannot run here; None when they can."""
    return None if mx.metal.is_available() else "MLX has no Metal on this machine"


def bind_experts(weights: Mapping[str, mx.array], spec: ExpertSpec) -> ExpertForward:
    """Routed experts over these weights; see `contract.ExpertKernel`. Unevaluated."""
    twin = reference.bind_experts(weights, spec)
    experts = describe_experts(weights, spec)
    if experts is None:
        return twin
    prompt = grouped.bind_experts(weights, spec)

    def forward(x: mx.array, slots: Slots) -> mx.array:
        n_tokens = math.prod(x.shape[:-1])
        if n_tokens == 0 or x.dtype not in FLOATS:
            return twin(x, slots)
        if n_tokens > DECODE_TOKENS:
            return prompt(x, slots)
        y = expert_down(expert_gate_up(x, slots, experts), slots, experts, x.dtype)
        return y.reshape(*slots.shape, y.shape[-1])

    return forward


@dataclass(frozen=True)
class Projection:
    """`n_slots` matrices [rows, cols] and the four arrays that a kernel reads them from."""

    format: MatrixFormat
    rows: int
    cols: int
    arrays: tuple[mx.array, mx.array, mx.array, mx.array]


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer; `gate` is None for SwitchMLP."""

    gate: Projection | None
    up: Projection
    down: Projection
    activation: Activation


def describe_experts(weights: Mapping[str, mx.array], spec: ExpertSpec) -> Experts | None:
    """The experts as the kernels see them; None when they do not cover them."""
    gated = spec.kind == "SwitchGLU"
    activation = recognize(spec.activation, gated)
    names = ("gate_proj", "up_proj", "down_proj") if gated else ("fc1", "fc2")
    parts = [_projection(name, weights, spec) for name in names]
    if activation is None:
        return None
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or (gated and not _alike(*found[:2])):
        return None
    return Experts(found[0] if gated else None, *found[-2:], activation)


def expert_gate_up(x: mx.array, slots: Slots, experts: Experts) -> mx.array:
    """[n_pairs, hidden] float32 from x [..., d_in] and slots [..., k]; at most DECODE_TOKENS
    rows are worth it."""
    up = experts.up
    rows = x.reshape(-1, up.cols)
    gated, top_k = experts.gate is not None, slots.shape[-1]
    launch = gate_up_launch(up.format, up.rows, up.cols, len(rows), top_k, gated)
    sizes = _sizes(up, top_k, ACTIVATIONS[experts.activation.kind])
    inputs = [rows, _slots(slots), sizes, limits(experts.activation)]
    inputs += [*(experts.gate or up).arrays, *up.arrays]
    return _run(launch, inputs, mx.float32)


def expert_down(
    hidden: mx.array, slots: Slots, experts: Experts, dtype: mx.Dtype, scores: mx.array | None = None
) -> mx.array:
    """[n_pairs, d_out] from hidden [n_pairs, hidden] float32 and slots [..., k], or
    [n_tokens, d_out] weighted with scores [..., k] and summed. Sums are float32."""
    down, top_k = experts.down, slots.shape[-1]
    n_tokens = slots.size // top_k
    launch = down_launch(down.format, down.rows, down.cols, n_tokens, top_k, scores is not None)
    # Not read without scores.
    factors = hidden if scores is None else _padded(scores.reshape(-1).astype(mx.float32))
    inputs = [hidden, _slots(slots), factors, _sizes(down, top_k), *down.arrays]
    return _run(launch, inputs, dtype)


def limits(activation: Activation) -> mx.array:
    """An activation's numbers, in the order of metal/activation.h; [6] float32."""
    numbers = (
        activation.alpha,
        activation.gate_max,
        activation.activated_max,
        activation.up_max,
        activation.up_bound,
        activation.up_shift,
    )
    return mx.array([min(number, NO_LIMIT) for number in numbers], mx.float32)


def _run(launch: Launch, inputs: list[mx.array], dtype: mx.Dtype) -> mx.array:
    (output,) = build(launch.kernel)(
        inputs=inputs,
        template=list(launch.template),
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=[launch.output_shape],
        output_dtypes=[dtype],
    )
    return output


def _sizes(part: Projection, top_k: int, activation: int = 0) -> mx.array:
    return mx.array([part.rows, part.cols, top_k, activation], mx.int32)


def _slots(slots: Slots) -> mx.array:
    return _padded(mx.array(np.ascontiguousarray(slots, np.int32).reshape(-1)))


def _padded(values: mx.array) -> mx.array:
    missing = LEAST_ELEMENTS - values.size
    return mx.pad(values, (0, missing)) if missing > 0 else values


def _alike(gate: Projection, up: Projection) -> bool:
    """Whether one description serves both."""
    dtypes = [[array.dtype for array in part.arrays] for part in (gate, up)]
    return (
        (gate.format, gate.rows, gate.cols) == (up.format, up.rows, up.cols)
        and dtypes[0] == dtypes[1]
    )


def _projection(
    name: str, weights: Mapping[str, mx.array], spec: ExpertSpec
) -> Projection | None:
    """A projection as the kernels see it; None when they do not cover it."""
    weight = weights[f"{name}.weight"]
    bias = weights.get(f"{name}.bias")
    packing = spec.packing.get(name)
    rows = weight.shape[1]
    if packing is None:
        kind = FLOATS.get(weight.dtype)
        if kind is None or weight.shape[2] % 8 != 0:
            return None
        shape = MatrixFormat(kind, weight.itemsize * 8, 0, bias is not None)
        words = weight.view(mx.uint32)
        found = Projection(shape, rows, weight.shape[2], _filled(words, None, None, bias))
    else:
        if f"{name}.global_scale" in weights:
            return None
        if not covers(packing.mode, packing.bits, packing.group_size):
            return None
        scales, biases = weights[f"{name}.scales"], weights.get(f"{name}.biases")
        shape = MatrixFormat(packing.mode, packing.bits, packing.group_size, bias is not None)
        cols = scales.shape[2] * packing.group_size
        found = Projection(shape, rows, cols, _filled(weight, scales, biases, bias))
    usable = all(_usable(array) for array in found.arrays)
    return found if usable and _address(found.arrays[0]) % shape.alignment == 0 else None


def _filled(
    weight: mx.array, scales: mx.array | None, biases: mx.array | None, bias: mx.array | None
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """The arrays with another in the place of each that is absent: it is not read there."""
    mx.eval([array for array in (weight, scales, biases, bias) if array is not None])
    scales = weight if scales is None else scales
    return weight, scales, scales if biases is None else biases, scales if bias is None else bias


def _usable(array: mx.array) -> bool:
    exporter: Any = array
    return array.size >= LEAST_ELEMENTS and memoryview(exporter).c_contiguous


def _address(array: mx.array) -> int:
    exporter: Any = array
    return ctypes.addressof(ctypes.c_char.from_buffer(memoryview(exporter).cast("B")))
