"""Routed experts through the native CPU library, in float32.

What the library does not cover (other dtypes, nvfp4, mxfp8) goes to the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe import native
from flashmoe.kernels import reference
from flashmoe.kernels.activations import recognize
from flashmoe.kernels.contract import ExpertForward, ExpertSpec, Slots

Floats = npt.NDArray[np.float32]
# [n, k, d_out] from x [n, d_in] and slots [n, k].
_Forward = Callable[[Floats, Slots], Floats]


def bind_experts(weights: Mapping[str, mx.array], spec: ExpertSpec) -> ExpertForward:
    """Routed experts over these weights; see `contract.ExpertKernel`. Calls evaluate `x`.

    One native call where the library knows the activation, otherwise one per projection with
    the activation in MLX between them.
    """
    twin = reference.bind_experts(weights, spec)
    projections = _projections(weights, spec)
    if projections is None:
        return twin
    run = _fused(projections, spec) or _unfused(projections, spec)

    def forward(x: mx.array, slots: Slots) -> mx.array:
        if x.dtype != mx.float32:
            return twin(x, slots)
        # Reshaped in numpy: for MLX it would be one more array to evaluate.
        rows = np.array(x, copy=False).reshape(-1, x.shape[-1])
        y = run(rows, slots.reshape(-1, slots.shape[-1]))
        return mx.array(y.reshape(*slots.shape, y.shape[-1]))

    return forward


@dataclass(frozen=True)
class _Projection:
    matrix: native.Matrix
    bias: mx.array | None

    def __call__(self, x: Floats, slots: Slots, x_rows: Slots | None = None) -> mx.array:
        """[n_pairs, rows], with the bias."""
        y = mx.array(native.matmul(x, self.matrix, slots, x_rows))
        return y if self.bias is None else y + self.bias[mx.array(slots)]


@dataclass(frozen=True)
class _Projections:
    gate: _Projection | None
    up: _Projection
    down: _Projection


def _fused(parts: _Projections, spec: ExpertSpec) -> _Forward | None:
    """Everything in one native call; None when the library lacks the activation."""
    activation = recognize(spec.activation, gated=parts.gate is not None)
    if activation is None:
        return None
    gate = parts.gate
    experts = native.experts(
        parts.up.matrix,
        parts.down.matrix,
        activation,
        gate.matrix if gate else None,
        gate_bias=gate.bias if gate else None,
        up_bias=parts.up.bias,
        down_bias=parts.down.bias,
    )
    return lambda x, slots: native.expert_forward(x, slots, experts)


def _unfused(parts: _Projections, spec: ExpertSpec) -> _Forward:
    def run(x: Floats, slots: Slots) -> Floats:
        pairs = slots.reshape(-1)
        rows = np.repeat(np.arange(len(x), dtype=np.int32), slots.shape[-1])
        inputs = [part(x, pairs, rows) for part in (parts.up, parts.gate) if part is not None]
        hidden = np.array(spec.activation(*inputs), copy=False)
        y: Floats = np.array(parts.down(hidden, pairs), copy=False)
        return y.reshape(*slots.shape, -1)

    return run


def _projections(weights: Mapping[str, mx.array], spec: ExpertSpec) -> _Projections | None:
    """The experts' matrices; None when the library does not cover one of them."""
    gated = spec.kind == "SwitchGLU"
    names = ("gate_proj", "up_proj", "down_proj") if gated else ("fc1", "fc2")
    found = []
    for name in names:
        matrix = _matrix(name, weights, spec)
        if matrix is None:
            return None
        found.append(_Projection(matrix, weights.get(f"{name}.bias")))
    gate = found.pop(0) if gated else None
    return _Projections(gate, *found)


def _matrix(name: str, weights: Mapping[str, mx.array], spec: ExpertSpec) -> native.Matrix | None:
    weight = weights[f"{name}.weight"]
    packing = spec.packing.get(name)
    if packing is None:
        return native.matrix(weight) if native.covers_floats(weight.dtype) else None
    if f"{name}.global_scale" in weights:
        return None
    if not native.covers(packing.mode, packing.bits, packing.group_size):
        return None
    return native.matrix(
        weight,
        weights[f"{name}.scales"],
        weights.get(f"{name}.biases"),
        bits=packing.bits,
        group_size=packing.group_size,
        mode=packing.mode,
    )
