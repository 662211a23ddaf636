"""nvfp4 of others: bytes of two 4-bit floats (E2M1), an 8-bit scale (E4M3) for 16 of them, and one
scale for the tensor.

MLX has that one only on GPUs, so these become floats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from flashmoe.base.dtypes import MLX_DTYPES
from flashmoe.base.errors import SourceError
from flashmoe.repacking.formats.affine import tensor_of
from flashmoe.repacking.formats.contract import Packed, StandIn, all_rows, float_dtype
from flashmoe.repacking.row_node import RowNode

BLOCK = 16
# 1.0 in E4M3.
ONE = 0x38


def floats_of(
    packed: Packed, names: tuple[str, str, str], combine: Callable[..., mx.array]
) -> StandIn:
    """A layer as floats of the checkpoint's dtype: code times `combine(scale, whole)`, the one of
    its block and the one for all, in float32, rounded once. `names` are of these three tensors.

    Raises SourceError for tensors that do not fit each other.
    """
    codes, scales, whole = names
    d_out, n_blocks = block_shape(packed, codes, BLOCK)
    tensor_of(packed, scales, ("F8_E4M3",), (d_out, n_blocks))
    info = packed.tensors.get(whole)
    tensor_of(packed, whole, ("F32",), (1,) if info is not None and info.shape else ())
    dtype = float_dtype(packed)
    layer = _Layer(codes, scales, all_rows(whole, packed.tensors[whole]), combine, dtype)
    return StandIn(dtype, (d_out, n_blocks * BLOCK), layer.rows)


def block_shape(packed: Packed, codes: str, size: int) -> tuple[int, int]:
    """Outputs of a layer, and blocks of so many inputs, whose codes are two to a byte."""
    d_out, n_bytes = tensor_of(packed, codes, ("U8",), (None, None))
    if 2 * n_bytes % size:
        raise SourceError(
            f"{codes} of {packed.where} is for {2 * n_bytes} inputs, no multiple of {size}"
        )
    return d_out, 2 * n_bytes // size


@dataclass(frozen=True)
class _Layer:
    codes: str
    scales: str
    whole: RowNode
    combine: Callable[..., mx.array]
    dtype: str

    def rows(self, begin: int, end: int) -> RowNode:
        inputs = (RowNode(self.codes, begin, end), RowNode(self.scales, begin, end), self.whole)
        return RowNode(apply=self._floats, inputs=inputs, moves=False)

    def _floats(self, codes: mx.array, scales: mx.array, whole: mx.array) -> mx.array:
        values = mx.dequantize(
            codes.view(mx.uint32),
            mx.full(scales.shape, ONE, dtype=mx.uint8),
            group_size=BLOCK,
            bits=4,
            mode="nvfp4",
            dtype=mx.float32,
        )
        factors = self.combine(mx.from_fp8(scales, dtype=mx.float32), whole.reshape(()))
        blocks = values.reshape(*scales.shape, BLOCK) * factors[..., None]
        return blocks.reshape(values.shape).astype(MLX_DTYPES[self.dtype])
