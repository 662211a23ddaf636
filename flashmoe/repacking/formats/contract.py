"""What a format of packed weights tells the rest of a repack."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from flashmoe.base.dtypes import MLX_DTYPES
from flashmoe.checkpoint.headers import TensorInfo
from flashmoe.repacking.row_node import RowNode

Weights = dict[str, mx.array]


@dataclass(frozen=True)
class Packed:
    """A checkpoint as a format sees it: `settings` is its `quantization_config`, `config` all of
    config.json, `tensors` every tensor of its files by name. `where` is what errors call it.
    `read` gives the bytes of a tensor, for the few that say what others are: each may be a
    request of the Hub. `modules` has the last names of the modules of mlx-lm's model, None where
    nobody knows them."""

    where: str
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], bytes]
    modules: Collection[str] | None = None


@dataclass(frozen=True)
class StandIn:
    """A tensor that mlx-lm sees in place of some of the source's.

    `dtype` is a safetensors name. `rows(begin, end)` makes rows `begin` to `end` of the first
    axis, `[end - begin, *shape[1:]]` of that dtype, out of rows of the source's tensors by MLX
    operations. A row's bits must not depend on which rows are asked for with it. Dtypes that MLX
    lacks arrive as uint8.
    """

    dtype: str
    shape: tuple[int, ...]
    rows: Callable[[int, int], RowNode]

    def whole(self) -> RowNode:
        return self.rows(0, self.shape[0] if self.shape else 1)


@dataclass(frozen=True)
class Presentation:
    """What mlx-lm is to see of a packed checkpoint.

    `stand_ins` by the names that the family's `sanitize` expects, `hidden` tensors not at all,
    and `config` over config.json: `quantization` with `bits` and `group_size` where stand-ins are
    packed weights, scales and biases as MLX has them, nothing where they are floats.
    """

    stand_ins: Mapping[str, StandIn] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    config: Mapping[str, Any] = field(default_factory=lambda: {"quantization_config": None})

    def of(self, weights: Weights) -> Weights:
        """The weights that mlx-lm sees, of the source's; what stands in is not evaluated, but
        values that are to be checked are."""

        def read(leaf: RowNode) -> mx.array:
            array = weights[leaf.leaf]
            return array[leaf.begin : leaf.end] if array.ndim else array

        made = {n: s.whole().evaluate(read, checked=True) for n, s in self.stand_ins.items()}
        return {**self._seen(weights), **made}

    def outline(self, weights: Weights) -> Weights:
        """The same for their names, shapes and dtypes only: what stands in is zeros."""
        zeros = {n: mx.zeros(s.shape, MLX_DTYPES[s.dtype]) for n, s in self.stand_ins.items()}
        return {**self._seen(weights), **zeros}

    def _seen(self, weights: Weights) -> Weights:
        return {name: array for name, array in weights.items() if name not in self.hidden}


# For what mlx-lm reads itself.
AS_IT_IS = Presentation(config={})


@dataclass(frozen=True)
class Format:
    """One way of packing weights.

    `methods` are values of `quant_method` in config.json, `endings` those of the names of tensors
    that only this format has, for a config that says nothing. `words` is what people call it.
    `present` raises SourceError for a variant that it does not read.
    """

    words: str
    methods: tuple[str, ...]
    present: Callable[[Packed], Presentation]
    endings: tuple[str, ...] = ()


def all_rows(name: str, info: TensorInfo) -> RowNode:
    """The whole of a source tensor."""
    return RowNode(name, 0, info.shape[0] if info.shape else 1)


def float_dtype(packed: Packed) -> str:
    """The safetensors dtype that a checkpoint's weights had before they were packed, as its
    config says; BF16 where it does not."""
    names = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
    for level in levels(packed.config):
        for key in ("dtype", "torch_dtype"):
            if str(level.get(key)) in names:
                return names[level[key]]
    return "BF16"


def levels(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config, and the one of its language model if that is nested."""
    nested = config.get("text_config")
    return [config, nested] if isinstance(nested, dict) else [config]
