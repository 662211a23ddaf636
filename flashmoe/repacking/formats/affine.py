"""Layers whose weights are scale * (code - zero), by groups of inputs: AWQ and GPTQ.

Where groups follow each other, and have a size that MLX knows, that is MLX's scale * code + bias:
the codes stay, and a bias is -scale * zero, rounded once to the dtype of the scales. Other layers
become floats, of that dtype too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from flashmoe.base.dtypes import FLOATING, MLX_DTYPES
from flashmoe.base.errors import SourceError
from flashmoe.repacking.formats.contract import Packed, Presentation, StandIn, all_rows
from flashmoe.repacking.formats.packed_ints import WORD_BITS, unpacked_columns
from flashmoe.repacking.row_node import RowNode

MLX_GROUPS = (128, 64, 32)
BITS = (2, 3, 4, 8)
# Weights that are floats at a time.
CHUNK_WEIGHTS = 2**22

_EXPERT = re.compile(r"\.experts\.\d+\.")
Rows = Callable[[int, int], RowNode]


@dataclass(frozen=True)
class Layer:
    """A linear layer `[d_out, d_in]` called `path`, `group` inputs to a scale.

    `words`, `scales` and `zeros` give rows (outputs) of MLX's words `[rows, d_in * bits / 32]`, and
    of `[rows, groups]`, uint32 the zeros. `index` is the tensor that says to which group an input
    belongs, where groups do not follow each other. `dtype` is that of the scales.
    """

    path: str
    bits: int
    d_out: int
    d_in: int
    group: int
    dtype: str
    words: Rows
    scales: Rows
    zeros: Rows
    index: RowNode | None = None

    @property
    def mlx_group(self) -> int | None:
        """The largest group of MLX's that divides the layer's, None if there is none."""
        if self.index is not None or self.d_in % self.group:
            return None
        return next((size for size in MLX_GROUPS if self.group % size == 0), None)

    @property
    def n_groups(self) -> int:
        return -(-self.d_in // self.group)

    def packed(self) -> dict[str, StandIn]:
        """The layer as MLX's words, scales and biases."""
        assert self.mlx_group is not None
        repeats = self.group // self.mlx_group
        shape = (self.d_out, self.n_groups * repeats)
        n_words = self.d_in * self.bits // WORD_BITS

        def scales(begin: int, end: int) -> RowNode:
            repeat = partial(mx.repeat, repeats=repeats, axis=1)
            return RowNode(apply=repeat, inputs=(self.scales(begin, end),), moves=repeats == 1)

        def biases(begin: int, end: int) -> RowNode:
            apply = partial(_biases, repeats)
            inputs = (self.scales(begin, end), self.zeros(begin, end))
            return RowNode(apply=apply, inputs=inputs, moves=False)

        return {
            f"{self.path}.weight": StandIn("U32", (self.d_out, n_words), self.words),
            f"{self.path}.scales": StandIn(self.dtype, shape, scales),
            f"{self.path}.biases": StandIn(self.dtype, shape, biases),
        }

    def floats(self) -> dict[str, StandIn]:
        """The layer as floats: each is rounded once."""

        def rows(begin: int, end: int) -> RowNode:
            inputs = [part(begin, end) for part in (self.words, self.scales, self.zeros)]
            if self.index is not None:
                inputs.append(self.index)
            return RowNode(apply=self._floats, inputs=tuple(inputs), moves=False)

        return {f"{self.path}.weight": StandIn(self.dtype, (self.d_out, self.d_in), rows)}

    def _floats(
        self, words: mx.array, scales: mx.array, zeros: mx.array, index: mx.array | None = None
    ) -> mx.array:
        if index is None:
            index = mx.arange(self.d_in, dtype=mx.uint32) // self.group
        n_columns = max(1, CHUNK_WEIGHTS // self.d_in)
        parts = []
        for begin in range(0, words.shape[0], n_columns):
            # By columns, as they came: it is fewer and longer copies.
            own = slice(begin, begin + n_columns)
            codes = unpacked_columns(mx.contiguous(words[own].T), self.bits).astype(mx.float32)
            zero = mx.take(zeros[own].T.astype(mx.float32), index, axis=0)
            scale = mx.take(scales[own].T.astype(mx.float32), index, axis=0)
            parts.append(((codes - zero) * scale).astype(MLX_DTYPES[self.dtype]).T)
        return mx.concatenate(parts)


def _biases(repeats: int, scales: mx.array, zeros: mx.array) -> mx.array:
    biases = -(zeros.astype(mx.float32) * scales.astype(mx.float32)).astype(scales.dtype)
    return mx.repeat(biases, repeats, axis=1)


def presentation_of(packed: Packed, layers: Sequence[Layer], hidden: set[str]) -> Presentation:
    """All layers as MLX has them if MLX has all of them so, all as floats otherwise.

    A layer that mlx-lm's model has not becomes floats in any case: what the family's `sanitize`
    makes of that (attention that absorbs a projection) would be packed once more.
    """
    kept = [layer for layer in layers if _is_module(packed, layer.path)]
    if not kept or any(layer.mlx_group is None for layer in kept) or not _stack(kept):
        kept = []
    paths = {layer.path for layer in kept}
    stand_ins: dict[str, StandIn] = {}
    for layer in layers:
        stand_ins |= layer.packed() if layer.path in paths else layer.floats()
    if not kept:
        return Presentation(stand_ins, frozenset(hidden))
    stated = {"bits": kept[0].bits, "group_size": kept[0].mlx_group}
    return Presentation(
        stand_ins, frozenset(hidden), {"quantization_config": None, "quantization": stated}
    )


def _is_module(packed: Packed, path: str) -> bool:
    """Whether mlx-lm's model has a module of a layer's name, or, for an expert, one for all."""
    if packed.modules is None or _EXPERT.search(path):
        return True
    return path.rpartition(".")[2] in packed.modules


def _stack(layers: Sequence[Layer]) -> bool:
    """Whether the experts of each layer are packed alike, so that they can be one tensor."""
    settings: dict[str, set[tuple[int, int | None]]] = {}
    for layer in layers:
        name = _EXPERT.sub(".experts.", layer.path)
        settings.setdefault(name, set()).add((layer.bits, layer.mlx_group))
    return all(len(found) == 1 for found in settings.values())


def columns(
    packed: Packed,
    name: str,
    apply: Callable[..., mx.array],
    others: tuple[RowNode, ...] = (),
    check: Callable[..., None] | None = None,
) -> Rows:
    """Rows made of all of a tensor and `others`, by `apply(begin, end, tensor, *others)`."""
    inputs = (all_rows(name, packed.tensors[name]), *others)

    def rows(begin: int, end: int) -> RowNode:
        return RowNode(apply=partial(apply, begin, end), inputs=inputs, moves=False, check=check)

    return rows


def turned(begin: int, end: int, scales: mx.array) -> mx.array:
    """Columns of [groups, d_out] as rows."""
    return scales[:, begin:end].T


def middle(bits: int, begin: int, end: int, scales: mx.array) -> mx.array:
    """The zeros of symmetric codes, for scales [groups, d_out]."""
    return mx.full((end - begin, scales.shape[0]), 1 << (bits - 1), dtype=mx.uint32)


def tensor_of(
    packed: Packed, name: str, dtypes: Sequence[str], shape: Sequence[int | None]
) -> tuple[int, ...]:
    """The shape of a tensor that must be there, be of one of `dtypes` and fit `shape`, where None
    is any size. Raises SourceError otherwise."""
    info = packed.tensors.get(name)
    if info is None:
        raise SourceError(f"{packed.where} lacks {name}; download it again")
    fits = len(info.shape) == len(shape) and all(
        wanted in (None, have) for wanted, have in zip(shape, info.shape, strict=False)
    )
    if not fits or info.dtype not in dtypes or 0 in info.shape:
        stated = ", ".join("any" if size is None else str(size) for size in shape)
        raise SourceError(
            f"{name} of {packed.where} is {info.dtype} {list(info.shape)}, not "
            f"{' or '.join(dtypes)} [{stated}], which the tensors beside it ask for"
        )
    return info.shape


def scales_shape(packed: Packed, path: str, d_out: int) -> tuple[int, str]:
    """The number of groups of a layer whose scales are [groups, d_out], and their dtype."""
    n_groups, _ = tensor_of(packed, f"{path}.scales", FLOATING, (None, d_out))
    return n_groups, packed.tensors[f"{path}.scales"].dtype


def group_size(packed: Packed, path: str, d_in: int, n_groups: int) -> int:
    """How many inputs share a scale; the config's number where that gives so many groups, since
    the last group may be smaller."""
    stated = packed.settings.get("group_size")
    if type(stated) is int and stated > 0 and -(-d_in // stated) == n_groups:
        return stated
    if d_in % n_groups:
        raise SourceError(
            f"{path}.scales of {packed.where} has {n_groups} groups, which do not divide "
            f"{d_in} inputs"
        )
    return d_in // n_groups


def paths_of(tensors: Mapping[str, object], ending: str) -> list[str]:
    """What comes before `ending` in the names of the tensors that have it, sorted."""
    return sorted(name.removesuffix(ending) for name in tensors if name.endswith(ending))
