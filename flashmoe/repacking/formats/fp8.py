"""Weights of 8-bit floats (E4M3) with a scale for each block, row or tensor."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from flashmoe.base.dtypes import FLOATING, MLX_DTYPES
from flashmoe.base.errors import SourceError
from flashmoe.checkpoint.headers import TensorInfo
from flashmoe.repacking.formats.contract import (
    AS_IT_IS,
    Format,
    Packed,
    Presentation,
    StandIn,
    all_rows,
    float_dtype,
)
from flashmoe.repacking.row_node import RowNode

E4M3 = "F8_E4M3"
# Two spellings of powers of two by their exponent.
EXPONENTS = ("F8_E8M0", "U8")
# What a weight's scales are called, beside its own name.
SCALES = ("_scale_inv", "_scale")
# Scales of activations and of caches, which nobody needs who computes with floats.
ACTIVATIONS = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".q_scale")
DEFAULT_BLOCK = (128, 128)
MXFP8_BLOCK = (32, 32)


def present(packed: Packed) -> Presentation:
    """Every E4M3 tensor as floats of the checkpoint's dtype, its scales hidden."""
    stated = block_size(packed.settings.get("weight_block_size"), packed.where)
    is_named = any(name.endswith(SCALES) for name in packed.tensors)
    if packed.settings.get("scale_fmt") == "ue8m0" and stated == MXFP8_BLOCK and not is_named:
        return AS_IT_IS  # mlx-lm keeps these packed, as mxfp8
    return unpacked(packed, stated)


def unpacked(packed: Packed, stated: tuple[int, int]) -> Presentation:
    """The same for blocks of the stated size, where a weight's scales say so."""
    dtype = float_dtype(packed)
    stand_ins, hidden = {}, set()
    for name, info in packed.tensors.items():
        if info.dtype != E4M3 or name.endswith(SCALES):
            continue  # scales of nvfp4 are E4M3 themselves
        scales = [name + ending for ending in SCALES if name + ending in packed.tensors]
        if not scales:
            raise SourceError(
                f"{name} of {packed.where} is of 8-bit floats, and there is no {name}{SCALES[0]} "
                "to scale them by"
            )
        scale = packed.tensors[scales[0]]
        block = block_of(info, scale, stated)
        if block is None:
            raise SourceError(
                f"{scales[0]} of {packed.where}, {scale.dtype} {list(scale.shape)}, is no scale "
                f"per block, row or tensor of {name}, {list(info.shape)}"
            )
        weight = _Weight(name, info, scales[0], scale, block, dtype)
        stand_ins[name] = StandIn(dtype, info.shape, weight.rows)
        hidden |= {name, *scales}
    hidden |= {name for name in packed.tensors if name.endswith(ACTIVATIONS)}
    return Presentation(stand_ins, frozenset(hidden))


FP8 = Format(
    "fp8 (E4M3, scales per block, row or tensor)",
    ("fp8", "fbgemm_fp8"),
    present,
    ("_scale_inv",),
)


def block_size(stated: object, where: str) -> tuple[int, int]:
    """Rows and columns of the blocks that a config states: [128, 128], or "128x128".

    Raises SourceError for anything else.
    """
    if not stated:
        return DEFAULT_BLOCK
    numbers = stated.split("x") if isinstance(stated, str) else stated
    if isinstance(numbers, list) and len(numbers) == 2:
        rows, columns = (int(str(n)) if str(n).isdecimal() else 0 for n in numbers)
        if rows and columns:
            return rows, columns
    raise SourceError(f"{where} states blocks of {stated!r}, not of rows and columns")


def block_of(
    info: TensorInfo, scale: TensorInfo, stated: tuple[int, int]
) -> tuple[int, int] | None:
    """Rows and columns that share a scale in the matrices `[..., d_out, d_in]` of a weight; None
    if its scales do not fit it. `stated` is the checkpoint's size of blocks."""
    if len(info.shape) < 2 or scale.dtype not in (*FLOATING, *EXPONENTS):
        return None
    d_out, d_in = info.shape[-2:]
    if scale.size == 1:
        return d_out, d_in
    grid = (*scale.shape, 1) if scale.shape == info.shape[:-1] else scale.shape
    if len(grid) != len(info.shape) or grid[:-2] != info.shape[:-2]:
        return None
    n_down, n_across = grid[-2:]
    if (n_down, n_across) == (-(-d_out // stated[0]), -(-d_in // stated[1])):
        return stated[0], stated[1]
    if 0 in grid or d_out % n_down or d_in % n_across:
        return None
    return d_out // n_down, d_in // n_across


@dataclass(frozen=True)
class _Weight:
    """A weight of 8-bit floats `[..., d_out, d_in]` and its scales."""

    name: str
    info: TensorInfo
    scale_name: str
    scale: TensorInfo
    block: tuple[int, int]
    dtype: str

    def rows(self, begin: int, end: int) -> RowNode:
        shape, block_rows = self.info.shape, self.block[0]
        scales, skipped = RowNode(self.scale_name, begin, end), 0
        if self.scale.size == 1:
            scales = all_rows(self.scale_name, self.scale)
        elif len(shape) == 2:
            first, skipped = divmod(begin, block_rows)
            scales = RowNode(self.scale_name, first, -(-end // block_rows))
        one = (1,) * len(shape) if self.scale.size == 1 else None
        is_exponents = self.scale.dtype in EXPONENTS
        dtype = MLX_DTYPES[self.dtype]

        def floats(weight: mx.array, scale: mx.array) -> mx.array:
            factors = exponentials(scale) if is_exponents else scale.astype(mx.float32)
            if one is not None:
                factors = factors.reshape(one)
            elif factors.ndim < weight.ndim:
                factors = factors[..., None]
            return scaled(weight, factors, self.block, skipped).astype(dtype)

        return RowNode(apply=floats, inputs=(RowNode(self.name, begin, end), scales), moves=False)


def scaled(
    weight: mx.array, scales: mx.array, block: tuple[int, int], skipped: int = 0
) -> mx.array:
    """float32 `[..., rows, d_in]` of E4M3 codes of that shape and float32 scales
    `[..., blocks down, blocks across]`; `skipped` rows of the first blocks are not there."""
    rows, d_in = weight.shape[-2:]
    factors = mx.repeat(scales, min(block[0], skipped + rows), axis=-2)
    factors = factors[..., skipped : skipped + rows, :]
    values = mx.from_fp8(weight, dtype=mx.float32)
    missing = factors.shape[-1] * block[1] - d_in
    if missing:
        values = mx.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
    blocks = values.reshape(*values.shape[:-1], -1, block[1]) * factors[..., None]
    return blocks.reshape(values.shape)[..., :d_in]


def exponentials(exponents: mx.array) -> mx.array:
    """float32 2 ** (exponent - 127) of bytes, exactly; 255 is no number."""
    bits = mx.where(exponents == 0, 1 << 22, exponents.astype(mx.uint32) << 23)
    bits = mx.where(exponents == 255, 0x7FC00000, bits)
    return bits.astype(mx.uint32).view(mx.float32)
