"""GPTQ, as AutoGPTQ and GPTQModel write it: 2, 3, 4 or 8 bits, with and without act-order.

`qweight` is int32 [d_in * bits / 32, d_out], a stream of bits down each column; `qzeros` int32
[groups, d_out * bits / 32], along each row. The first version of the format stores zeros minus
one, the second as they are. `g_idx` [d_in] names the group of each input.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from flashmoe.base.errors import SourceError
from flashmoe.repacking.formats.affine import (
    BITS,
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
from flashmoe.repacking.formats.contract import Format, Packed, Presentation, all_rows
from flashmoe.repacking.formats.packed_ints import WORD_BITS, unpacked

# What a zero is stored less than it is, by version.
SHORTFALL = {"gptq": 1, "gptq_v2": 0}


def present(packed: Packed) -> Presentation:
    """Every layer that has a `qweight`, as MLX packs it where that loses nothing."""
    settings = packed.settings
    version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if version not in SHORTFALL or settings.get("is_marlin_format"):
        version = version if version not in SHORTFALL else "marlin"
        raise SourceError(
            f"{packed.where} is GPTQ in the layout {version!r}, which flashmoe does not read; it "
            f"reads {' and '.join(SHORTFALL)}"
        )
    paths = paths_of(packed.tensors, ".qweight")
    if not paths:
        raise SourceError(
            f"{packed.where} is said to be GPTQ, but none of its tensors is a qweight"
        )
    layers = [_layer(packed, path, SHORTFALL[version]) for path in paths]
    parts = ("qweight", "qzeros", "scales", "g_idx")
    hidden = {f"{path}.{part}" for path in paths for part in parts}
    return presentation_of(packed, layers, hidden)


GPTQ = Format("GPTQ (2, 3, 4 and 8 bits)", ("gptq",), present)


def _layer(packed: Packed, path: str, shortfall: int) -> Layer:
    tensors, settings = packed.tensors, packed.settings
    n_words, d_out = tensor_of(packed, f"{path}.qweight", ("I32", "U32"), (None, None))
    n_groups, dtype = scales_shape(packed, path, d_out)
    bits = _bits(packed, path, d_out, n_groups)
    d_in = n_words * WORD_BITS // bits
    if d_in * bits != n_words * WORD_BITS:
        raise SourceError(
            f"{path}.qweight of {packed.where} has {n_words} rows of words, which codes of {bits} "
            "bits do not fill"
        )
    index = None
    if f"{path}.g_idx" in tensors:
        tensor_of(packed, f"{path}.g_idx", ("I32", "U32", "I64"), (d_in,))
        index = all_rows(f"{path}.g_idx", tensors[f"{path}.g_idx"])
    is_ordered = bool(settings.get("desc_act")) and n_groups > 1
    if is_ordered and index is None:
        raise SourceError(
            f"{packed.where} is GPTQ with act-order, but lacks {path}.g_idx; download it again"
        )
    group = group_size(packed, path, d_in, n_groups)
    follows = None if is_ordered else group
    check = partial(_check_index, f"{path}.g_idx of {packed.where}", n_groups, follows)
    others = () if index is None else (index,)
    return Layer(
        path=path,
        bits=bits,
        d_out=d_out,
        d_in=d_in,
        group=group,
        dtype=dtype,
        words=columns(packed, f"{path}.qweight", _words, others, check),
        scales=columns(packed, f"{path}.scales", turned),
        zeros=_zeros(packed, path, bits, shortfall),
        index=index if is_ordered else None,
    )


def _bits(packed: Packed, path: str, d_out: int, n_groups: int) -> int:
    """From the zeros' width, since layers may differ from what the config says of most."""
    bits = packed.settings.get("bits", 4)
    if f"{path}.qzeros" in packed.tensors:
        name = f"{path}.qzeros"
        _, n_words = tensor_of(packed, name, ("I32", "U32"), (n_groups, None))
        bits = n_words * WORD_BITS // d_out
        if bits not in BITS or bits * d_out != n_words * WORD_BITS:
            raise SourceError(
                f"{name} of {packed.where} has {n_words} words for {d_out} outputs, which is none "
                f"of {', '.join(map(str, BITS))} bits"
            )
        if bits != packed.settings.get("bits", bits) and not packed.settings.get("dynamic"):
            raise SourceError(
                f"{name} of {packed.where} has {bits}-bit zeros, and config.json says "
                f"{packed.settings['bits']} bits"
            )
    elif not packed.settings.get("sym"):
        raise SourceError(f"{packed.where} lacks {path}.qzeros; download it again")
    if bits not in BITS:
        raise SourceError(
            f"{packed.where} is GPTQ with {bits} bits; flashmoe reads {', '.join(map(str, BITS))}"
        )
    return int(bits)


def _zeros(packed: Packed, path: str, bits: int, shortfall: int) -> Rows:
    if f"{path}.qzeros" in packed.tensors:
        return columns(packed, f"{path}.qzeros", partial(_unpacked_zeros, bits, shortfall))
    return columns(packed, f"{path}.scales", partial(middle, bits))


def _words(begin: int, end: int, qweight: mx.array, *_: mx.array) -> mx.array:
    return qweight.view(mx.uint32)[:, begin:end].T


def _unpacked_zeros(bits: int, shortfall: int, begin: int, end: int, qzeros: mx.array) -> mx.array:
    # A zero of 0 is stored as the largest code by the first version.
    zeros = (unpacked(qzeros.view(mx.uint32), bits) + shortfall) & ((1 << bits) - 1)
    return zeros[:, begin:end].T


def _check_index(
    name: str, n_groups: int, group: int | None, _: mx.array, index: mx.array | None = None
) -> None:
    """Raise SourceError unless each input's group is one that there is, and, if `group` is given,
    the next `group` inputs have the next."""
    if index is None:
        return
    if int(mx.min(index)) < 0 or int(mx.max(index)) >= n_groups:
        raise SourceError(f"{name} names groups that are none of the {n_groups} that have scales")
    if group is not None and not mx.array_equal(index, mx.arange(index.size) // group):
        raise SourceError(
            f"{name} does not go from group to group, but config.json says desc_act false; "
            "set it to true there"
        )
