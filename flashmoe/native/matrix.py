"""Weights in MLX arrays as the library sees them, and products with them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe.base.errors import OptionError
from flashmoe.native import loader as native

FLOATS = {mx.float32: native.F32, mx.bfloat16: native.BF16, mx.float16: native.F16}
FORMATS = {"affine": native.AFFINE, "mxfp4": native.MXFP4}


@dataclass(frozen=True)
class Matrix:
    """`n_slots` matrices [rows, cols] that live in MLX arrays.

    The arrays are kept alive, and what is written into them later is what products see.
    """

    n_slots: int
    rows: int
    cols: int
    description: native.FmMatrix
    arrays: tuple[mx.array, ...]


def matrix(
    weight: mx.array,
    scales: mx.array | None = None,
    biases: mx.array | None = None,
    *,
    bits: int = 0,
    group_size: int = 0,
    mode: str = "affine",
) -> Matrix:
    """Describe evaluated row-contiguous arrays [n_slots, rows, ...].

    Without `scales` the weight is float [n_slots, rows, cols]; otherwise uint32
    [n_slots, rows, cols * bits / 32] with scales, and for affine biases, of
    [n_slots, rows, cols / group_size]. Raises OptionError when shapes or dtypes do not fit.
    """
    n_slots, rows, width = weight.shape
    described = native.FmMatrix(slots=n_slots, rows=rows, bits=bits, group_size=group_size)
    arrays = tuple(array for array in (weight, scales, biases) if array is not None)
    if scales is None:
        if weight.dtype not in FLOATS:
            raise OptionError(f"weights of {weight.dtype} without scales cannot be multiplied")
        cols = width
        described.format = FLOATS[weight.dtype]
    else:
        if weight.dtype != mx.uint32 or mode not in FORMATS or bits < 1 or group_size < 1:
            raise OptionError(f"{mode} weights of {weight.dtype} are not covered")
        cols = width * 32 // bits
        described.format = FORMATS[mode]
        shape = (n_slots, rows, cols // group_size)
        affine = mode == "affine"
        dtypes = list(FLOATS) if affine else [mx.uint8]
        for array in arrays[1:]:
            if array.shape != shape or array.dtype not in dtypes or array.dtype != scales.dtype:
                raise OptionError(
                    f"scales and biases must be {shape} of one dtype, "
                    f"not {array.shape} of {array.dtype}"
                )
        if affine != (biases is not None):
            raise OptionError(f"{mode} weights come {'with' if affine else 'without'} biases")
        described.scale_dtype = FLOATS.get(scales.dtype, native.F32)
        described.scales, described.scales_slot_bytes = place(scales)
        if biases is not None:
            described.biases, described.biases_slot_bytes = place(biases)
    described.cols = cols
    described.weight, described.weight_slot_bytes = place(weight)
    return Matrix(n_slots, rows, cols, described, arrays)


def covers(mode: str, bits: int, group_size: int) -> bool:
    """Whether weights packed so can be multiplied."""
    if mode == "mxfp4":
        return (bits, group_size) == (4, 32)
    return mode == "affine" and bits in (2, 3, 4, 5, 6, 8) and group_size in (32, 64, 128)


def covers_floats(dtype: mx.Dtype) -> bool:
    """Whether unquantized weights of that dtype can be multiplied."""
    return dtype in FLOATS


def matmul(
    x: npt.NDArray[np.float32],
    w: Matrix,
    slots: npt.NDArray[np.int32] | None = None,
    x_rows: npt.NDArray[np.int32] | None = None,
    out: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """y[p] = w[slots[p]] @ x[x_rows[p]], [n_pairs, rows] float32.

    `x` [n, cols]; slot 0 for every pair without `slots`, row p for pair p without `x_rows`.
    Raises OptionError for arguments that do not fit and formats that are not covered.
    """
    x = np.ascontiguousarray(x, np.float32)
    n_pairs = len(x) if slots is None and x_rows is None else len(_either(x_rows, slots))
    if x.ndim != 2 or x.shape[1] != w.cols:
        raise OptionError(f"x must be [n, {w.cols}], not {list(x.shape)}")
    slots = _indices(slots, n_pairs, w.n_slots, "slots")
    x_rows = _indices(x_rows, n_pairs, len(x), "x_rows")
    if x_rows is None and n_pairs > len(x):
        raise OptionError(f"{n_pairs} pairs need as many rows of x, not {len(x)}")
    if out is None:
        out = np.empty((n_pairs, w.rows), np.float32)
    elif out.shape != (n_pairs, w.rows) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise OptionError(f"out must be a row-contiguous float32 array [{n_pairs}, {w.rows}]")
    if out.size == 0:
        return out
    native.check(
        native.loaded().fm_matmul(
            _address(x), _address(x_rows), _address(slots), n_pairs, w.description, _address(out)
        )
    )
    return out


def place(array: mx.array) -> tuple[int, int]:
    """Address of slot 0, and the distance between slots in bytes.

    Raises OptionError for an array that is not row-contiguous.
    """
    exporter: Any = array
    view = memoryview(exporter)
    if not view.c_contiguous:
        raise OptionError("weights must be row-contiguous")
    if view.nbytes == 0:
        return 0, 0
    # A view from MLX is writable; ctypes takes the address of nothing else.
    return ctypes.addressof(ctypes.c_char.from_buffer(view)), view.nbytes // array.shape[0]


def _either(
    x_rows: npt.NDArray[np.int32] | None, slots: npt.NDArray[np.int32] | None
) -> npt.NDArray[np.int32]:
    chosen = slots if x_rows is None else x_rows
    assert chosen is not None
    return chosen


def _indices(
    values: npt.NDArray[np.int32] | None, n_pairs: int, bound: int, name: str
) -> npt.NDArray[np.int32] | None:
    if values is None:
        return None
    values = np.ascontiguousarray(values, np.int32)
    if values.shape != (n_pairs,):
        raise OptionError(f"{name} must be [{n_pairs}], not {list(values.shape)}")
    if n_pairs and not 0 <= int(values.min()) <= int(values.max()) < bound:
        raise OptionError(f"{name} must lie in 0 .. {bound - 1}")
    return values


def _address(array: npt.NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data
