"""Routed experts in MLX arrays as the library sees them, and running them in one call."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe.base.errors import OptionError
from flashmoe.native import loader as native
from flashmoe.native.matrix import FLOATS, Matrix, place

KINDS = {
    "sigmoid": native.SIGMOID,
    "gelu_tanh": native.GELU_TANH,
    "relu2": native.RELU2,
    "situ": native.SITU,
}


@dataclass(frozen=True)
class Activation:
    """min(a(min(g, gate_max)), activated_max) * (b(clip(u, -up_max, up_max)) + up_shift).

    b(u) = up_bound * tanh(u / up_bound). `kind` is sigmoid (a = g * sigmoid(alpha * g), SiLU at
    alpha 1), gelu_tanh, relu2 or situ (a = alpha * tanh(g / alpha) * sigmoid(g)). NativeExperts
    without a gate take min(a(min(u, gate_max)), activated_max) alone.
    """

    kind: str
    alpha: float = 1.0
    gate_max: float = math.inf
    activated_max: float = math.inf
    up_max: float = math.inf
    up_bound: float = math.inf
    up_shift: float = 0.0


@dataclass(frozen=True)
class NativeExperts:
    """`n_slots` experts [d_in] -> [d_out]; the arrays behind them are kept alive."""

    d_in: int
    d_out: int
    description: native.FmExperts
    parts: tuple[Matrix | mx.array | None, ...]


def experts(
    up: Matrix,
    down: Matrix,
    activation: Activation,
    gate: Matrix | None = None,
    *,
    gate_bias: mx.array | None = None,
    up_bias: mx.array | None = None,
    down_bias: mx.array | None = None,
) -> NativeExperts:
    """Describe experts; biases are evaluated arrays [n_slots, rows] of a floating dtype.

    Raises OptionError when shapes or dtypes do not fit.
    """
    described = native.FmExperts(up=up.description, down=down.description)
    if gate is not None:
        described.gate = gate.description
    described.gate_bias = _vectors(gate_bias, gate)
    described.up_bias = _vectors(up_bias, up)
    described.down_bias = _vectors(down_bias, down)
    described.activation = native.FmActivation(
        KINDS[activation.kind],
        activation.alpha,
        activation.gate_max,
        activation.activated_max,
        activation.up_max,
        activation.up_bound,
        activation.up_shift,
    )
    parts = (gate, up, down, gate_bias, up_bias, down_bias)
    return NativeExperts(up.cols, down.rows, described, parts)


def expert_forward(
    x: npt.NDArray[np.float32], slots: npt.NDArray[np.int32], experts: NativeExperts
) -> npt.NDArray[np.float32]:
    """y[t, j] = expert slots[t, j] applied to x[t]: [n, k, d_out] from [n, d_in] and [n, k].

    Raises OptionError for arguments that do not fit and formats that are not covered.
    """
    n_tokens, top_k = slots.shape
    if x.shape != (n_tokens, experts.d_in):
        raise OptionError(f"x must be [{n_tokens}, {experts.d_in}], not {list(x.shape)}")
    x = np.ascontiguousarray(x, np.float32)
    slots = np.ascontiguousarray(slots, np.int32)
    y = np.empty((n_tokens, top_k, experts.d_out), np.float32)
    if y.size:
        native.check(
            native.loaded().fm_expert_forward(
                x.ctypes.data,
                slots.ctypes.data,
                n_tokens,
                top_k,
                experts.description,
                y.ctypes.data,
            )
        )
    return y


def _vectors(bias: mx.array | None, matrix: Matrix | None) -> native.FmVectors:
    if bias is None:
        return native.FmVectors()
    if matrix is None or bias.dtype not in FLOATS or bias.shape != (matrix.n_slots, matrix.rows):
        raise OptionError(f"an expert bias of {bias.shape} {bias.dtype} fits no projection")
    return native.FmVectors(place(bias)[0], FLOATS[bias.dtype])
