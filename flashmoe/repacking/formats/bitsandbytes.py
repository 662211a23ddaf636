"""bitsandbytes: 4-bit nf4 and fp4, their scales nested or not, and LLM.int8().

A 4-bit weight is uint8 [n / 2, 1], the first of two codes in the upper half of a byte, in blocks of
`blocksize` codes that do not care for rows. `absmax` scales a block; nested ones are codes
themselves, in blocks of `nested_blocksize`, less an offset. The weight's shape, and the offset, are
JSON in a tensor of bytes. An int8 weight has a scale per row, `SCB`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe.base.dtypes import MLX_DTYPES
from flashmoe.base.errors import SourceError
from flashmoe.repacking.formats.affine import paths_of, tensor_of
from flashmoe.repacking.formats.contract import (
    Format,
    Packed,
    Presentation,
    StandIn,
    all_rows,
    float_dtype,
)
from flashmoe.repacking.row_node import RowNode

KINDS = ("nf4", "fp4")
STATE = ".quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
# As a single is nearest to 1 / 127, which bitsandbytes multiplies with.
INT8_STEP = 7.874015718698502e-3

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def present(packed: Packed) -> Presentation:
    """Every packed weight as the floats that bitsandbytes makes of it."""
    stand_ins: dict[str, StandIn] = {}
    hidden: set[str] = set()
    known: dict[tuple[Any, ...], _State] = {}
    for kind in KINDS:
        for name in paths_of(packed.tensors, STATE + kind):
            weight = _Weight(name, kind, _state(packed, name, kind, known), packed)
            stand_ins[name] = StandIn(weight.state.dtype, weight.state.shape, weight.rows)
            hidden |= {f"{name}.{part}" for part in PARTS} | {weight.state_name}
    for path in paths_of(packed.tensors, ".SCB"):
        stand_ins[f"{path}.weight"] = _int8(packed, path)
        hidden |= {f"{path}.SCB", f"{path}.weight_format"}
    for ending in (".absmax", ".weight_format"):
        for path in paths_of(packed.tensors, ending):
            if path + ending not in hidden:
                raise SourceError(
                    f"{packed.where} has {path}{ending}, but lacks what says how {path} is packed; "
                    "download it again"
                )
    if not stand_ins:
        raise SourceError(
            f"{packed.where} is said to be packed by bitsandbytes, but none of its tensors is"
        )
    return Presentation(stand_ins, frozenset(hidden))


BITSANDBYTES = Format(
    "bitsandbytes (nf4, fp4 and int8)",
    ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
    present,
    tuple(STATE + kind for kind in KINDS),
)


@dataclass(frozen=True)
class _State:
    """How a weight `[d_out, d_in]` is packed; `nested_block` is 0 where scales are not."""

    shape: tuple[int, ...]
    dtype: str
    block: int
    nested_block: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def _state(packed: Packed, name: str, kind: str, known: dict[tuple[Any, ...], _State]) -> _State:
    """What the first weight of this name, but for its layer and expert, and of this size says of
    itself. That others say the same is checked when they are made."""
    scales = packed.tensors.get(f"{name}.absmax")
    if name not in packed.tensors or scales is None:
        lacking = f"{name}.absmax" if name in packed.tensors else name
        raise SourceError(f"{packed.where} lacks {lacking}; download it again")
    key = (_NUMBER.sub("", name), kind, packed.tensors[name].shape, scales.dtype, scales.shape)
    if key not in known:
        where = f"{name}{STATE}{kind} of {packed.where}"
        known[key] = _parsed(packed.read(f"{name}{STATE}{kind}"), kind, where)[0]
    state = known[key]
    n_bytes = -(-state.size // 2)
    tensor_of(packed, name, ("U8",), (n_bytes, 1))
    n_blocks = -(-state.size // state.block)
    tensor_of(packed, f"{name}.absmax", ("U8",) if state.nested_block else ("F32",), (n_blocks,))
    tensor_of(packed, f"{name}.quant_map", ("F32",), (16,))
    if state.nested_block:
        n_nested = -(-n_blocks // state.nested_block)
        tensor_of(packed, f"{name}.nested_absmax", ("F32",), (n_nested,))
        tensor_of(packed, f"{name}.nested_quant_map", ("F32",), (256,))
    return state


def _parsed(content: bytes, kind: str, where: str) -> tuple[_State, float]:
    """A quant_state and its offset. Raises SourceError unless it is one."""
    try:
        stated: Mapping[str, Any] = json.loads(content)
        shape = tuple(stated["shape"])
        block, nested_block = stated["blocksize"], stated.get("nested_blocksize", 0)
        numbers = (*shape, block, *([nested_block] if nested_block else []))
        offset = float(stated.get("nested_offset", 0.0))
        is_sound = (
            len(shape) == 2
            and all(type(number) is int and 0 < number < 2**40 for number in numbers)
            and stated["quant_type"] == kind
            and stated.get("nested_dtype", "float32") == "float32"
            and math.isfinite(offset)
        )
        state = _State(shape, DTYPES[stated["dtype"]], block, nested_block)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_sound = False
    if not is_sound:
        raise SourceError(f"{where} does not say how a {kind} matrix is packed")
    return state, offset


@dataclass(frozen=True)
class _Weight:
    """A 4-bit weight."""

    name: str
    kind: str
    state: _State
    packed: Packed

    @property
    def state_name(self) -> str:
        return f"{self.name}{STATE}{self.kind}"

    def rows(self, begin: int, end: int) -> RowNode:
        """Floats of rows, out of the bytes and the blocks that these lie in."""
        state, d_in = self.state, self.state.shape[1]
        first, last = begin * d_in, end * d_in
        blocks = first // state.block, -(-last // state.block)
        inputs = [
            RowNode(self.name, first // 2, -(-last // 2)),
            self._all("quant_map"),
            RowNode(f"{self.name}.absmax", *blocks),
            all_rows(self.state_name, self.packed.tensors[self.state_name]),
        ]
        if state.nested_block:
            nested = blocks[0] // state.nested_block, -(-blocks[1] // state.nested_block)
            inputs += [
                RowNode(f"{self.name}.nested_absmax", *nested),
                self._all("nested_quant_map"),
            ]
        return RowNode(
            apply=partial(self._floats, begin, end),
            inputs=tuple(inputs),
            moves=False,
            check=self._check,
        )

    def _all(self, part: str) -> RowNode:
        name = f"{self.name}.{part}"
        return all_rows(name, self.packed.tensors[name])

    def _floats(
        self,
        begin: int,
        end: int,
        codes: mx.array,
        values: mx.array,
        absmax: mx.array,
        state: mx.array,
        *nested: mx.array,
    ) -> mx.array:
        block, d_in = self.state.block, self.state.shape[1]
        first, n = begin * d_in, (end - begin) * d_in
        if nested:
            skipped = first // block % self.state.nested_block
            found = mx.take(nested[1], absmax)
            absmax = scaled(found, nested[0], self.state.nested_block, skipped)
            absmax = absmax + self._offset(state)
        # Both values of a byte are looked up at once.
        bytes_ = mx.arange(256)
        pairs = mx.stack([mx.take(values, bytes_ >> 4), mx.take(values, bytes_ & 15)], axis=1)
        found = mx.take(pairs.view(mx.int64).reshape(-1), codes.reshape(-1)).view(mx.float32)
        floats = scaled(found[first % 2 : first % 2 + n], absmax, block, first % block)
        return floats.astype(MLX_DTYPES[self.state.dtype]).reshape(end - begin, d_in)

    def _offset(self, state: mx.array) -> mx.array:
        """What nested scales are stored less."""
        where = f"{self.state_name} of {self.packed.where}"
        return mx.array(_parsed(_bytes(state), self.kind, where)[1], dtype=mx.float32)

    def _check(
        self, codes: mx.array, values: mx.array, absmax: mx.array, state: mx.array, *_: mx.array
    ) -> None:
        where = f"{self.state_name} of {self.packed.where}"
        if _parsed(_bytes(state), self.kind, where)[0] != self.state:
            raise SourceError(f"{where} is not what tensors of its kind and size say")


def scaled(values: mx.array, scales: mx.array, block: int, skipped: int) -> mx.array:
    """Values [n] times the scale of their block, `skipped` of the first block being elsewhere."""
    n = values.size
    if skipped == 0 and n % block == 0:
        return (values.reshape(-1, block) * scales[:, None]).reshape(n)
    return values * mx.repeat(scales, min(block, skipped + n))[skipped : skipped + n]


def _bytes(array: mx.array) -> bytes:
    return np.array(array).tobytes()


def _int8(packed: Packed, path: str) -> StandIn:
    name, scale = f"{path}.weight", f"{path}.SCB"
    shape = tensor_of(packed, name, ("I8",), (None, None))
    tensor_of(packed, scale, ("F32",), (shape[0],))
    dtype = float_dtype(packed)

    def floats(weight: mx.array, scales: mx.array, *_: mx.array) -> mx.array:
        values = weight.astype(mx.float32) * scales[:, None] * INT8_STEP
        return values.astype(MLX_DTYPES[dtype])

    def check(weight: mx.array, scales: mx.array, *layout: mx.array) -> None:
        if any(array.item() for array in layout):
            raise SourceError(f"{name} of {packed.where} is not stored by rows; save it again")

    def rows(begin: int, end: int) -> RowNode:
        inputs = [RowNode(name, begin, end), RowNode(scale, begin, end)]
        layout = packed.tensors.get(f"{path}.weight_format")
        if layout is not None and layout.size == 1:
            inputs.append(all_rows(f"{path}.weight_format", layout))
        return RowNode(apply=floats, inputs=tuple(inputs), moves=False, check=check)

    return StandIn(dtype, shape, rows)
