"""Routed experts through the native CPU library, in float32.

What the library does not cover (other dtypes, nvfp4, mxfp8) goes to the reference.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe import native
from flashmoe.kernels import reference
from flashmoe.kernels.contract import ExpertSpec


def expert_forward(
    x: mx.array, slots: mx.array, weights: Mapping[str, mx.array], spec: ExpertSpec
) -> mx.array:
    """Routed experts over a bank; see `contract.ExpertKernel` for shapes. Evaluates `x`."""
    inputs = ("up_proj", "gate_proj") if spec.kind == "SwitchGLU" else ("fc1",)
    output = "down_proj" if spec.kind == "SwitchGLU" else "fc2"
    if x.dtype != mx.float32 or native.available() is not None:
        return reference.expert_forward(x, slots, weights, spec)
    matrices = {name: _matrix(name, weights, spec) for name in (*inputs, output)}
    if None in matrices.values():
        return reference.expert_forward(x, slots, weights, spec)
    rows = np.array(x.reshape(-1, x.shape[-1]), copy=False)
    pairs = np.array(slots.reshape(-1).astype(mx.int32), copy=False)
    # Each row of x goes to k slots, each row of the hidden layer to one.
    row_of_pair = np.repeat(np.arange(len(rows), dtype=np.int32), slots.shape[-1])

    def project(
        name: str, x: npt.NDArray[np.float32], x_rows: npt.NDArray[np.int32] | None
    ) -> mx.array:
        matrix = matrices[name]
        assert matrix is not None
        y = mx.array(native.matmul(x, matrix, pairs, x_rows)).reshape(*slots.shape, 1, matrix.rows)
        bias = weights.get(f"{name}.bias")
        return y if bias is None else y + mx.expand_dims(bias[slots], -2)

    hidden = spec.activation(*(project(name, rows, row_of_pair) for name in inputs))
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return project(output, np.array(hidden, copy=False), None).squeeze(-2)


def _matrix(name: str, weights: Mapping[str, mx.array], spec: ExpertSpec) -> native.Matrix | None:
    """One projection's weights; None when the library does not cover their format."""
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
