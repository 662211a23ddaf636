"""AWQ with 4 bits, as AutoAWQ and GPTQModel write it.

The layout "gemm" has `qweight` int32 [d_in, d_out / 8] and `qzeros` [groups, d_out / 8], the codes
of a word in the order 0, 2, 4, 6, 1, 3, 5, 7, and `scales` [groups, d_out]. The layout "gemv" has
`qweight` [d_out, d_in / 8], which are MLX's words, and `scales` and `qzeros` by rows, padded.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from flashmoe.base.dtypes import FLOATING
from flashmoe.base.errors import SourceError
from flashmoe.repacking.formats.affine import (
    Layer,
    Rows,
    columns,
    group_size,
    middle,
    paths_of,
    presentation_of,
    scales_shape,
    tensor_of,
    turned,
)
from flashmoe.repacking.formats.contract import Format, Packed, Presentation
from flashmoe.repacking.formats.packed_ints import awq_turned, awq_unpacked, unpacked
from flashmoe.repacking.row_node import RowNode

BITS = 4
PER_WORD = 8
INTEGERS = ("I32", "U32")


def present(packed: Packed) -> Presentation:
    """Every layer that has a `qweight`, as MLX packs it where that loses nothing."""
    settings = packed.settings
    stated = (settings.get(key) for key in ("version", "checkpoint_format", "format"))
    version = str(next((name for name in stated if name), "gemm")).lower()
    layouts = {"gemm": _gemm, "gemv": _gemv}
    if version not in layouts:
        raise SourceError(
            f"{packed.where} is AWQ in the layout {version!r}, which flashmoe does not read; it "
            f"reads {' and '.join(layouts)}"
        )
    bits = settings.get("bits", settings.get("w_bit", BITS))
    if bits != BITS:
        raise SourceError(f"{packed.where} is AWQ with {bits} bits; flashmoe reads {BITS}")
    paths = paths_of(packed.tensors, ".qweight")
    if not paths:
        raise SourceError(f"{packed.where} is said to be AWQ, but none of its tensors is a qweight")
    layers = [layouts[version](packed, path) for path in paths]
    hidden = {f"{path}.{part}" for path in paths for part in ("qweight", "qzeros", "scales")}
    return presentation_of(packed, layers, hidden)


AWQ = Format("AWQ (4 bits)", ("awq",), present)


def _gemm(packed: Packed, path: str) -> Layer:
    d_in, n_words = tensor_of(packed, f"{path}.qweight", INTEGERS, (None, None))
    d_out = n_words * PER_WORD
    n_groups, dtype = scales_shape(packed, path, d_out)
    if d_in % PER_WORD:
        raise SourceError(
            f"{path}.qweight of {packed.where} is for {d_in} inputs, no multiple of {PER_WORD}"
        )
    words, scales, zeros = (f"{path}.{part}" for part in ("qweight", "scales", "qzeros"))
    if _has_zeros(packed, path):
        tensor_of(packed, zeros, INTEGERS, (n_groups, n_words))
        own_zeros = columns(packed, zeros, _gemm_zeros)
    else:
        own_zeros = columns(packed, scales, partial(middle, BITS))
    return Layer(
        path=path,
        bits=BITS,
        d_out=d_out,
        d_in=d_in,
        group=group_size(packed, path, d_in, n_groups),
        dtype=dtype,
        words=columns(packed, words, _gemm_words),
        scales=columns(packed, scales, turned),
        zeros=own_zeros,
    )


def _gemv(packed: Packed, path: str) -> Layer:
    d_out, n_words = tensor_of(packed, f"{path}.qweight", INTEGERS, (None, None))
    d_in = n_words * PER_WORD
    group = packed.settings.get("group_size", packed.settings.get("q_group_size", 128))
    group = d_in if group == -1 else group
    _, width = tensor_of(packed, f"{path}.qzeros", INTEGERS, (d_out, None))
    tensor_of(packed, f"{path}.scales", FLOATING, (d_out, width * PER_WORD))
    if type(group) is not int or group < 1 or not 0 < -(-d_in // group) <= width * PER_WORD:
        raise SourceError(
            f"{path}.scales of {packed.where} has {width * PER_WORD} columns, too few for groups "
            f"of {group} of {d_in} inputs"
        )
    n_groups = -(-d_in // group)

    def part(name: str, apply: partial[mx.array]) -> Rows:
        def rows(begin: int, end: int) -> RowNode:
            return RowNode(
                apply=apply, inputs=(RowNode(f"{path}.{name}", begin, end),), moves=False
            )

        return rows

    def words(begin: int, end: int) -> RowNode:
        # The very bytes, as another dtype.
        leaf = RowNode(f"{path}.qweight", begin, end)
        return RowNode(apply=_as_words, inputs=(leaf,), moves=True)

    return Layer(
        path=path,
        bits=BITS,
        d_out=d_out,
        d_in=d_in,
        group=group,
        dtype=packed.tensors[f"{path}.scales"].dtype,
        words=words,
        scales=part("scales", partial(_first, n_groups)),
        zeros=part("qzeros", partial(_gemv_zeros, n_groups)),
    )


def _has_zeros(packed: Packed, path: str) -> bool:
    """Whether a layer stores its zeros; without them they are in the middle, if the config says
    that there are none."""
    return f"{path}.qzeros" in packed.tensors or packed.settings.get("zero_point", True)


def _gemm_words(begin: int, end: int, qweight: mx.array) -> mx.array:
    first = begin // PER_WORD
    turned = awq_turned(qweight.view(mx.uint32)[:, first : -(-end // PER_WORD)])
    return turned[begin - first * PER_WORD : end - first * PER_WORD]


def _gemm_zeros(begin: int, end: int, qzeros: mx.array) -> mx.array:
    return awq_unpacked(qzeros.view(mx.uint32))[:, begin:end].T


def _as_words(qweight: mx.array) -> mx.array:
    return qweight.view(mx.uint32)


def _first(count: int, scales: mx.array) -> mx.array:
    return scales[:, :count]


def _gemv_zeros(count: int, qzeros: mx.array) -> mx.array:
    return unpacked(qzeros.view(mx.uint32), BITS)[:, :count]
