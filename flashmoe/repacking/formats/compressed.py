"""compressed-tensors, a container: what a layer is packed as follows from its tensors.

`weight` of 8-bit floats or integers with `weight_scale`; or `weight_packed`, which is int32 words
of integers, codes that are half their range too large, or bytes of two mxfp4 or nvfp4 codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe.base.dtypes import FLOATING
from flashmoe.base.errors import SourceError
from flashmoe.repacking.formats import fp8, nvfp4
from flashmoe.repacking.formats.affine import (
    BITS,
    Layer,
    Rows,
    paths_of,
    presentation_of,
    tensor_of,
)
from flashmoe.repacking.formats.contract import Format, Packed, Presentation, StandIn, all_rows
from flashmoe.repacking.formats.packed_ints import WORD_BITS, unpacked
from flashmoe.repacking.row_node import RowNode

PACKED = ".weight_packed"
GLOBAL_SCALE = ".weight_global_scale"
PARTS = (
    PACKED,
    ".weight",
    ".weight_scale",
    ".weight_shape",
    ".weight_zero_point",
    ".weight_g_idx",
    GLOBAL_SCALE,
    ".input_global_scale",
)
MXFP4_BLOCK = 32
_NUMBER = re.compile(r"\d+")
MXFP4 = {"bits": 4, "group_size": MXFP4_BLOCK, "mode": "mxfp4"}


def present(packed: Packed) -> Presentation:
    """Integers and mxfp4 as MLX packs them where it can, fp8 and nvfp4 as floats."""
    is_dense = packed.settings.get("format") == "dense"
    if not is_dense and not any(n.endswith((PACKED, ".weight_scale")) for n in packed.tensors):
        raise SourceError(
            f"{packed.where} is said to be of compressed-tensors, but none of its tensors is a "
            "weight_packed or a weight_scale"
        )
    schemes = [_weights_of(group) for group in _groups(packed.settings)]
    blocks = [scheme.get("block_structure") for scheme in schemes]
    block = next((stated for stated in blocks if stated), None)
    floats = fp8.unpacked(packed, fp8.block_size(block, packed.where))
    widths = _Widths(packed)
    layers: list[Layer] = []
    codes: dict[str, StandIn] = {}
    unpacked = dict(floats.stand_ins)
    hidden = set(floats.hidden)
    for path in paths_of(packed.tensors, PACKED):
        if path + GLOBAL_SCALE in packed.tensors:
            names = (path + PACKED, f"{path}.weight_scale", path + GLOBAL_SCALE)
            unpacked[f"{path}.weight"] = nvfp4.floats_of(packed, names, mx.divide)
        elif packed.tensors[path + PACKED].dtype == "U8":
            codes |= _mxfp4(packed, path)
        else:
            layers.append(_words(packed, path, schemes, widths))
        hidden |= {path + part for part in PARTS}
    for path in paths_of(packed.tensors, ".weight"):
        if packed.tensors[f"{path}.weight"].dtype == "I8":
            layers.append(_bytes(packed, path))
            hidden |= {path + part for part in PARTS}
    integers = presentation_of(packed, layers, hidden)
    config = {"quantization_config": None, "quantization": MXFP4} if codes else integers.config
    stand_ins = {**unpacked, **integers.stand_ins, **codes}
    return Presentation(stand_ins, frozenset(hidden), config)


COMPRESSED = Format(
    "compressed-tensors (integers, fp8, mxfp4, nvfp4)", ("compressed-tensors",), present, (PACKED,)
)


def _groups(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    if isinstance(groups, dict):
        yield from (group for group in groups.values() if isinstance(group, dict))


def _weights_of(group: Mapping[str, Any]) -> Mapping[str, Any]:
    weights = group.get("weights")
    return weights if isinstance(weights, dict) else {}


class _Widths:
    """The inputs of layers, each read once for all layers whose names differ in numbers alone."""

    def __init__(self, packed: Packed) -> None:
        self._packed = packed
        self._known: dict[str, int] = {}

    def __call__(self, path: str) -> int:
        kind = _NUMBER.sub("", path)
        name = f"{path}.weight_shape"
        if kind not in self._known:
            tensor_of(self._packed, name, ("I64",), (2,))
            self._known[kind] = int(np.frombuffer(self._packed.read(name), "<i8")[1])
        return self._known[kind]


def _fitting(
    schemes: list[Mapping[str, Any]], n_words: int, n_groups: int
) -> set[tuple[int, int, int]]:
    """Bits, inputs and inputs per scale of a layer of so many words and scales a row, as far as
    schemes go."""
    found = set()
    for scheme in schemes:
        bits, group = scheme.get("num_bits"), scheme.get("group_size")
        if type(bits) is int and bits in BITS:
            d_in = n_words * WORD_BITS // bits
            size = group if type(group) is int and group > 0 else d_in
            if size * n_groups == d_in:
                found.add((bits, d_in, size))
    return found


def _words(packed: Packed, path: str, schemes: list[Mapping[str, Any]], widths: _Widths) -> Layer:
    """A layer of int32 words, which are MLX's."""
    d_out, n_words = tensor_of(packed, path + PACKED, ("I32",), (None, None))
    _, n_groups = tensor_of(packed, f"{path}.weight_scale", FLOATING, (d_out, None))
    found = _fitting(schemes, n_words, n_groups)
    if len(found) > 1:
        # Layers of one name are packed alike: what tells them apart is read of one of them.
        found &= {fit for fit in found if fit[1] == widths(path)}
    if len(found) != 1:
        raise SourceError(
            f"{path}{PACKED} of {packed.where}, I32 {[d_out, n_words]} with {n_groups} scales a "
            "row, is packed as no single one of the config_groups says; flashmoe reads integers "
            f"of {', '.join(map(str, BITS))} bits"
        )
    bits, d_in, group = found.pop()
    index = f"{path}.weight_g_idx"
    return Layer(
        path=path,
        bits=bits,
        d_out=d_out,
        d_in=d_in,
        group=group,
        dtype=packed.tensors[f"{path}.weight_scale"].dtype,
        words=partial(_moved, path + PACKED),
        scales=partial(RowNode, f"{path}.weight_scale"),
        zeros=_zeros(packed, path, bits, d_out, n_groups),
        index=all_rows(index, packed.tensors[index]) if index in packed.tensors else None,
    )


def _bytes(packed: Packed, path: str) -> Layer:
    """A layer of int8, with scales by rows or one for all."""
    d_out, d_in = tensor_of(packed, f"{path}.weight", ("I8",), (None, None))
    name = f"{path}.weight_scale"
    info = packed.tensors.get(name)
    if info is None or info.dtype not in FLOATING or info.size not in (1, d_out) or d_in % 4:
        stated = None if info is None else f"{info.dtype} {list(info.shape)}"
        raise SourceError(
            f"{name} of {packed.where}, {stated}, is no scale of the rows of I8 {[d_out, d_in]}"
        )
    one = info.size == 1

    def scales(begin: int, end: int) -> RowNode:
        if one:
            whole = all_rows(name, info)
            return RowNode(apply=partial(_for_all, end - begin), inputs=(whole,), moves=False)
        leaf = RowNode(name, begin, end)
        return RowNode(apply=lambda scale: scale.reshape(-1, 1), inputs=(leaf,), moves=True)

    def words(begin: int, end: int) -> RowNode:
        return RowNode(apply=_shifted, inputs=(RowNode(f"{path}.weight", begin, end),), moves=False)

    def zeros(begin: int, end: int) -> RowNode:
        return RowNode(apply=partial(_middle, 8), inputs=(scales(begin, end),), moves=False)

    return Layer(path, 8, d_out, d_in, d_in, info.dtype, words, scales, zeros)


def _zeros(packed: Packed, path: str, bits: int, d_out: int, n_groups: int) -> Rows:
    """Of codes in words, which are as much too large as the codes."""
    name = f"{path}.weight_zero_point"
    if name not in packed.tensors:

        def middle(begin: int, end: int) -> RowNode:
            leaf = RowNode(f"{path}.weight_scale", begin, end)
            return RowNode(apply=partial(_middle, bits), inputs=(leaf,), moves=False)

        return middle
    n_words = -(-d_out * bits // WORD_BITS)
    tensor_of(packed, name, ("I32",), (n_words, n_groups))
    whole = all_rows(name, packed.tensors[name])

    def rows(begin: int, end: int) -> RowNode:
        return RowNode(apply=partial(_columns, bits, begin, end), inputs=(whole,), moves=False)

    return rows


def _mxfp4(packed: Packed, path: str) -> dict[str, StandIn]:
    """A layer of mxfp4, the very codes and scales."""
    d_out, n_blocks = nvfp4.block_shape(packed, path + PACKED, MXFP4_BLOCK)
    scale = f"{path}.weight_scale"
    tensor_of(packed, scale, ("U8", "F8_E8M0"), (d_out, n_blocks))
    return {
        f"{path}.weight": StandIn("U32", (d_out, n_blocks * 4), partial(_moved, path + PACKED)),
        f"{path}.scales": StandIn("U8", (d_out, n_blocks), partial(RowNode, scale)),
    }


def _moved(name: str, begin: int, end: int) -> RowNode:
    return RowNode(apply=_as_words, inputs=(RowNode(name, begin, end),), moves=True)


def _as_words(array: mx.array) -> mx.array:
    return array.view(mx.uint32)


def _shifted(codes: mx.array) -> mx.array:
    """MLX's words of int8 codes, which become 128 larger."""
    return (codes.view(mx.uint8) ^ 128).view(mx.uint32)


def _middle(bits: int, scales: mx.array) -> mx.array:
    return mx.full(scales.shape, 1 << (bits - 1), dtype=mx.uint32)


def _for_all(n_rows: int, scale: mx.array) -> mx.array:
    return mx.broadcast_to(scale.reshape(1, 1), (n_rows, 1))


def _columns(bits: int, begin: int, end: int, words: mx.array) -> mx.array:
    """Rows of zeros [rows, groups] of words that hold them one below the other."""
    return unpacked(words.view(mx.uint32).T, bits)[:, begin:end].T
