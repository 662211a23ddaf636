"""safetensors dtype names and MLX dtypes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

MLX_DTYPES: dict[str, mx.Dtype] = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F64": mx.float64,
}
FLOATING = ("F16", "BF16", "F32")

_NAMES = {dtype: name for name, dtype in MLX_DTYPES.items()}


def dtype_name(dtype: mx.Dtype) -> str:
    """The safetensors name of an MLX dtype; KeyError for one that safetensors lacks."""
    return _NAMES[dtype]


def array_bytes(array: mx.array) -> memoryview:
    """The evaluated bytes of an array, row-contiguous, as a flat view (no copy where possible)."""
    if array.size == 0:
        return memoryview(b"")
    flat = mx.contiguous(array).reshape(-1)
    return shared_bytes(flat if flat.dtype == mx.uint8 else flat.view(mx.uint8))


def shared_bytes(array: mx.array) -> memoryview:
    """The memory of an evaluated row-contiguous array as a flat, writable view.

    What is written to it is what MLX reads next; the view keeps the array alive.
    """
    exporter: Any = array
    return memoryview(exporter).cast("B")
