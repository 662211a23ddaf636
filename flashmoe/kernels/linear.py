"""Resident linear layers through the native CPU library, in float32.

The classes are mlx's own with another product: parameters, names and isinstance checks stay.
What reaches them in another dtype than float32 goes to mlx.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flashmoe import native

# Smaller layers stay with MLX: leaving and re-entering its graph costs more than they take.
LEAST_WEIGHTS = 1 << 17


class NativeLinear(nn.Linear):
    """`nn.Linear`: x [..., cols] -> [..., rows]. Evaluates `x`."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.dtype == mx.float32:
            return _with_bias(self, _product(self._matrix, x))
        y: mx.array = super().__call__(x)
        return y


class NativeQuantizedLinear(nn.QuantizedLinear):
    """`nn.QuantizedLinear`: x [..., cols] -> [..., rows]. Evaluates `x`."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.dtype == mx.float32:
            return _with_bias(self, _product(self._matrix, x))
        y: mx.array = super().__call__(x)
        return y


class NativeQuantizedEmbedding(nn.QuantizedEmbedding):
    """`nn.QuantizedEmbedding`, its use as the output layer included. Evaluates `x` there."""

    def as_linear(self, x: mx.array) -> mx.array:
        if x.dtype == mx.float32:
            return _product(self._matrix, x)
        y: mx.array = super().as_linear(x)
        return y


_TWINS = {
    nn.Linear: NativeLinear,
    nn.QuantizedLinear: NativeQuantizedLinear,
    nn.QuantizedEmbedding: NativeQuantizedEmbedding,
}


def native_twin(module: nn.Module) -> nn.Module | None:
    """The same layer with the native product, sharing its evaluated parameters, or None when
    the module is no linear layer, is small, or is packed in a way that is not covered."""
    twin = _TWINS.get(type(module))
    if twin is None:
        return None
    matrix = _matrix(module)
    if matrix is None or matrix.rows * matrix.cols < LEAST_WEIGHTS:
        return None
    made: Any = twin.__new__(twin)
    nn.Module.__init__(made)
    dict.update(made, module)
    vars(made).update(vars(module))
    made._matrix = matrix
    return made  # type: ignore[no-any-return]


def _matrix(module: nn.Module) -> native.Matrix | None:
    """The layer's weight as a bank with one slot; None when it is not covered."""
    weight: mx.array = module["weight"]
    if weight.ndim != 2:
        return None
    if "scales" not in module:
        return native.matrix(_slot(weight)) if native.covers_floats(weight.dtype) else None
    mode = getattr(module, "mode", "affine")
    if not native.covers(mode, module.bits, module.group_size):
        return None
    biases = module.get("biases")
    return native.matrix(
        _slot(weight),
        _slot(module["scales"]),
        None if biases is None else _slot(biases),
        bits=module.bits,
        group_size=module.group_size,
        mode=mode,
    )


def _slot(array: mx.array) -> mx.array:
    slot = mx.contiguous(mx.expand_dims(array, 0))
    mx.eval(slot)
    return slot


def _product(matrix: native.Matrix, x: mx.array) -> mx.array:
    rows = np.array(x.reshape(-1, x.shape[-1]), copy=False)
    return mx.array(native.matmul(rows, matrix)).reshape(*x.shape[:-1], matrix.rows)


def _with_bias(module: nn.Module, y: mx.array) -> mx.array:
    return y + module["bias"] if "bias" in module else y
