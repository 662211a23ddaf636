"""A bank's arrays as the Metal kernels read them, or None where they do not cover them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from flashmoe.kernels.activations import recognize
from flashmoe.kernels.contract import ExpertSpec
from flashmoe.kernels.metal_launch import FLOAT_VALUES, MatrixFormat, covers
from flashmoe.native import Activation

FLOATS = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}

# MLX hands arrays with fewer elements to a kernel in another address space.
LEAST_ELEMENTS = 8


@dataclass(frozen=True)
class Projection:
    """`n_slots` matrices [rows, cols]: weights as 32-bit words, scales, biases, bias.

    An array that is absent has another in its place, which the kernel does not read.
    """

    format: MatrixFormat
    rows: int
    cols: int
    arrays: tuple[mx.array, mx.array, mx.array, mx.array]


@dataclass(frozen=True)
class ExpertMatrices:
    """The routed experts of one layer; `gate` is None for SwitchMLP."""

    gate: Projection | None
    up: Projection
    down: Projection
    activation: Activation


def describe_experts(weights: Mapping[str, mx.array], spec: ExpertSpec) -> ExpertMatrices | None:
    """The experts of a bank [n_slots, ...]; None when the kernels do not cover them."""
    gated = spec.kind == "SwitchGLU"
    activation = recognize(spec.activation, gated)
    up = _projection("up_proj" if gated else "fc1", weights, spec)
    down = _projection("down_proj" if gated else "fc2", weights, spec)
    gate = _projection("gate_proj", weights, spec) if gated else None
    if activation is None or up is None or down is None:
        return None
    if gated and (gate is None or not _alike(gate, up)):
        return None
    return ExpertMatrices(gate, up, down, activation)


def _alike(gate: Projection, up: Projection) -> bool:
    """Whether one set of template arguments and sizes serves both."""
    return (
        gate.format == up.format
        and (gate.rows, gate.cols) == (up.rows, up.cols)
        and [a.dtype for a in gate.arrays] == [a.dtype for a in up.arrays]
    )


def _projection(name: str, weights: Mapping[str, mx.array], spec: ExpertSpec) -> Projection | None:
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    packing = spec.packing.get(name)
    if packing is None:
        kind = FLOATS.get(weight.dtype)
        if kind is None or weight.shape[2] % FLOAT_VALUES:
            return None
        found = MatrixFormat(kind, weight.itemsize * 8, 0, bias is not None)
        rows, cols = weight.shape[1:]
        return _usable(Projection(found, rows, cols, _filled(weight.view(mx.uint32), bias=bias)))
    if f"{name}.global_scale" in weights:
        return None
    if not covers(packing.mode, packing.bits, packing.group_size):
        return None
    found = MatrixFormat(packing.mode, packing.bits, packing.group_size, bias is not None)
    scales, biases = weights[f"{name}.scales"], weights.get(f"{name}.biases")
    rows, cols = scales.shape[1], scales.shape[2] * packing.group_size
    return _usable(Projection(found, rows, cols, _filled(weight, scales, biases, bias)))


def _filled(
    weight: mx.array,
    scales: mx.array | None = None,
    biases: mx.array | None = None,
    bias: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    mx.eval([array for array in (weight, scales, biases, bias) if array is not None])
    scales = weight if scales is None else scales
    return weight, scales, scales if biases is None else biases, scales if bias is None else bias


def _usable(part: Projection) -> Projection | None:
    for array in part.arrays:
        exporter: Any = array
        if array.size < LEAST_ELEMENTS or not memoryview(exporter).c_contiguous:
            return None
    return part if address(part.arrays[0]) % part.format.alignment == 0 else None


def address(array: mx.array) -> int:
    """Where an evaluated, row-contiguous array begins."""
    exporter: Any = array
    return ctypes.addressof(ctypes.c_char.from_buffer(memoryview(exporter).cast("B")))
