"""Resident linear layers through the native CPU library, in float32.

The classes are mlx's and mlx-lm's own with another product: parameters, names and isinstance
checks stay. What reaches them in another dtype than float32 goes to mlx, and so does looking
embeddings up, which takes a row and no product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

from flashmoe import native
from flashmoe.base.clock import PhaseClock

# Smaller layers stay with MLX: leaving and re-entering its graph costs more than they take.
LEAST_WEIGHTS = 1 << 17
# For fewer rows it does not pay to unpack and turn round a matrix that lies the other way.
LEAST_TURNED_ROWS = 32


class NativeLinear(nn.Linear):
    """`nn.Linear`: x [..., cols] -> [..., rows]. Evaluates `x`."""

    def __call__(self, x: mx.array) -> mx.array:
        if self._native and x.dtype == mx.float32:
            return _with_bias(self, _product(self, x))
        y: mx.array = super().__call__(x)
        return y


class NativeQuantizedLinear(nn.QuantizedLinear):
    """`nn.QuantizedLinear`: x [..., cols] -> [..., rows]. Evaluates `x`."""

    def __call__(self, x: mx.array) -> mx.array:
        if self._native and x.dtype == mx.float32:
            return _with_bias(self, _product(self, x))
        y: mx.array = super().__call__(x)
        return y


class NativeEmbedding(nn.Embedding):
    """`nn.Embedding`, its use as the output layer included. Evaluates `x` there."""

    def as_linear(self, x: mx.array) -> mx.array:
        if self._native and x.dtype == mx.float32:
            return _product(self, x)
        y: mx.array = super().as_linear(x)
        return y


class NativeQuantizedEmbedding(nn.QuantizedEmbedding):
    """`nn.QuantizedEmbedding`, its use as the output layer included. Evaluates `x` there."""

    def as_linear(self, x: mx.array) -> mx.array:
        if self._native and x.dtype == mx.float32:
            return _product(self, x)
        y: mx.array = super().as_linear(x)
        return y


class NativeMultiLinear(MultiLinear):
    """mlx-lm's `MultiLinear`, a matrix per head: x [..., heads, n, cols] -> [..., heads, n, rows].

    Evaluates `x`. The transposed product, rows -> cols, goes to mlx for few rows of `x`.
    """

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        if _is_native_per_head(self, x, transpose):
            return _product_per_head(self, x, transpose, self["weight"])
        y: mx.array = super().__call__(x, transpose)
        return y


class NativeQuantizedMultiLinear(QuantizedMultiLinear):
    """mlx-lm's `QuantizedMultiLinear`; see `NativeMultiLinear`."""

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        if _is_native_per_head(self, x, transpose):
            floats = (
                None
                if transpose
                else mx.dequantize(
                    self["weight"],
                    self["scales"],
                    self.get("biases"),
                    group_size=self.group_size,
                    bits=self.bits,
                    mode=self.mode,
                )
            )
            return _product_per_head(self, x, transpose, floats)
        y: mx.array = super().__call__(x, transpose)
        return y


_TWINS = {
    nn.Linear: NativeLinear,
    nn.QuantizedLinear: NativeQuantizedLinear,
    nn.Embedding: NativeEmbedding,
    nn.QuantizedEmbedding: NativeQuantizedEmbedding,
    MultiLinear: NativeMultiLinear,
    QuantizedMultiLinear: NativeQuantizedMultiLinear,
}


def native_twin(module: nn.Module, clock: PhaseClock | None = None) -> nn.Module | None:
    """The same layer with the native product, sharing its evaluated parameters, or None when
    the module is no linear layer, is small, or is packed in a way that is not covered.

    `clock` is told that products, and what they wait for, are computing.
    """
    twin = _TWINS.get(type(module))
    if twin is None:
        return None
    matrix = _matrix(module)
    if matrix is None or matrix.n_slots * matrix.rows * matrix.cols < LEAST_WEIGHTS:
        return None
    made: Any = twin.__new__(twin)
    nn.Module.__init__(made)
    dict.update(made, module)
    vars(made).update(vars(module))
    made._matrix = matrix
    made._clock = clock or PhaseClock()
    made._native = True
    return made  # type: ignore[no-any-return]


def output_layers(model: nn.Module) -> list[nn.Module]:
    """The native layers with the most rows, of which the one that gives the logits is one."""
    layers: list[Any] = [m for m in model.modules() if type(m) in _TWINS.values()]
    most = max((layer._matrix.rows for layer in layers), default=0)
    return [layer for layer in layers if layer._matrix.rows == most]


@contextmanager
def left_lazy(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Leave the products of native `layers` to MLX, which never computes what nobody reads."""
    natives: Sequence[Any] = layers
    try:
        for layer in natives:
            layer._native = False
        yield
    finally:
        for layer in natives:
            layer._native = True


def _matrix(module: nn.Module) -> native.Matrix | None:
    """The layer's weight as one slot, or one for each head; None when it is not covered."""
    weight: mx.array = module["weight"]
    if "scales" not in module:
        return native.matrix(_slots(weight)) if native.covers_floats(weight.dtype) else None
    mode = getattr(module, "mode", "affine")
    if not native.covers(mode, module.bits, module.group_size):
        return None
    biases = module.get("biases")
    return native.matrix(
        _slots(weight),
        _slots(module["scales"]),
        None if biases is None else _slots(biases),
        bits=module.bits,
        group_size=module.group_size,
        mode=mode,
    )


def _slots(array: mx.array) -> mx.array:
    slots = mx.contiguous(array if array.ndim == 3 else mx.expand_dims(array, 0))
    mx.eval(slots)
    return slots


def _product(layer: Any, x: mx.array) -> mx.array:
    matrix: native.Matrix = layer._matrix
    with layer._clock.during("computing"):
        # Reshaped in numpy: for MLX it would be one more array to evaluate.
        rows = np.array(x, copy=False).reshape(-1, x.shape[-1])
        y = native.matmul(rows, matrix)
    return mx.array(y.reshape(*x.shape[:-1], matrix.rows))


def _is_native_per_head(layer: Any, x: mx.array, transpose: bool) -> bool:
    native_here: bool = layer._native and x.dtype == mx.float32
    return native_here and (transpose or x.shape[-2] >= LEAST_TURNED_ROWS)


def _product_per_head(
    layer: Any, x: mx.array, transpose: bool, weight: mx.array | None
) -> mx.array:
    """`weight` [heads, rows, cols] in floats is what a transposed product turns round."""
    with layer._clock.during("computing"):
        matrix: native.Matrix = layer._matrix
        if not transpose:
            assert weight is not None
            matrix = native.matrix(_slots(weight.swapaxes(-1, -2)))
        heads, n = matrix.n_slots, x.shape[-2]
        rows = np.array(x.reshape(-1, x.shape[-1]), copy=False)
        # Every head's rows of x, which may be the same for all heads.
        x_rows = np.arange(len(rows), dtype=np.int32).reshape(-1, x.shape[-3], n)
        shape = (len(x_rows), heads, n)
        x_rows = np.broadcast_to(x_rows, shape)
        slots = np.broadcast_to(np.arange(heads, dtype=np.int32)[:, None], shape)
        y = native.matmul(rows, matrix, slots.reshape(-1), x_rows.reshape(-1))
    return mx.array(y).reshape(*x.shape[:-3], heads, n, matrix.rows)


def _with_bias(module: nn.Module, y: mx.array) -> mx.array:
    return y + module["bias"] if "bias" in module else y
