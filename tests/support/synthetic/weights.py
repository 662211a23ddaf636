"""What a synthetic model's tensors hold, and their bytes piece by piece.

Packed weights are random codes under one scale per tensor. The scales are chosen so that signals
keep unit size, and that what a token is outweighs what layers add to it: embeddings are large and
everything that writes to the residual stream is small. Tokens then stay apart at every depth, and
route apart, which is the hardest case for a bank.

Knows MLX's packing of random codes; knows no families and no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol
from zlib import crc32

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from flashmoe.base.dtypes import array_bytes, dtype_name
from flashmoe.checkpoint.architecture import expert_modules, projections_of
from flashmoe.store.layout import TensorSpec

PIECE_BYTES = 16 * 2**20
# What a layer adds to the residual stream, in units of an embedding and of its own input.
BRANCH_GAIN = 1 / 8
# Tied embeddings also are the output layer: a token's own logit, the others' being near zero.
TIED_OWN_LOGIT = 4.0
# Floating codes of 8 bits include NaN; without the exponent's top bit they are below two.
CODE_MASKS = {"mxfp8": 0xBFBFBFBFBFBFBFBF}
ALL_BITS = 2**64 - 1
SAMPLED_GROUPS = 64


class Fill(Protocol):
    """The content of a tensor."""

    def piece(self, rng: np.random.Generator, begin: int, end: int) -> Any:
        """Bytes `begin` to `end` of the tensor, asked for in order; a buffer."""


class PlannedTensor(Protocol):
    """A tensor to be; `pieces` gives its bytes, in order, with their offsets. What is left out
    is a hole, and no part of `written_bytes`."""

    @property
    def spec(self) -> TensorSpec: ...
    @property
    def written_bytes(self) -> int: ...
    def pieces(self) -> Iterator[tuple[int, Any]]: ...


@dataclass(frozen=True)
class Codes:
    """Random bits, each word of 64 kept to `mask`."""

    mask: int = ALL_BITS

    def piece(self, rng: np.random.Generator, begin: int, end: int) -> Any:
        words = rng.integers(0, 2**64, -(-(end - begin) // 8), np.uint64)
        if self.mask != ALL_BITS:
            words &= np.uint64(self.mask)
        return memoryview(words).cast("B")[: end - begin]


@dataclass(frozen=True)
class Constant:
    """One element, over and over."""

    element: bytes

    def piece(self, rng: np.random.Generator, begin: int, end: int) -> Any:
        return self.element * ((end - begin) // len(self.element))


@dataclass(frozen=True)
class Normal:
    """Normally distributed floats."""

    spread: float
    dtype: mx.Dtype

    def piece(self, rng: np.random.Generator, begin: int, end: int) -> Any:
        values = rng.standard_normal((end - begin) // self.dtype.size, np.float32)
        return array_bytes(mx.array(values * np.float32(self.spread)).astype(self.dtype))


@dataclass(frozen=True)
class Kept:
    """What mlx-lm starts with."""

    content: bytes

    def piece(self, rng: np.random.Generator, begin: int, end: int) -> Any:
        return self.content[begin:end]


@dataclass(frozen=True)
class SyntheticTensor:
    """A tensor to be; what is random in it depends on the seed and its name alone."""

    spec: TensorSpec
    fill: Fill
    seed: int

    @property
    def written_bytes(self) -> int:
        return self.spec.nbytes

    def pieces(self) -> Iterator[tuple[int, Any]]:
        """All bytes, in buffers of at most PIECE_BYTES."""
        rng = self.generator()
        for begin in range(0, self.spec.nbytes, PIECE_BYTES):
            yield begin, self.fill.piece(rng, begin, min(begin + PIECE_BYTES, self.spec.nbytes))

    def generator(self) -> np.random.Generator:
        """Where all that is random in it comes from."""
        seed = np.random.SeedSequence([self.seed, crc32(self.spec.name.encode())])
        return np.random.Generator(np.random.SFC64(seed))


def choose_spreads(model: nn.Module, vocabulary: int) -> dict[str, float]:
    """The standard deviation of each matrix of an unquantized model, by the tensor's name.

    `vocabulary` is the number of logits. Roles are told by type and shape alone.
    """
    matrices = {
        name: tuple(array.shape)
        for name, array in tree_flatten(model.parameters())
        if array.ndim > 1 and mx.issubdtype(array.dtype, mx.floating)
    }
    embeddings = {
        f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Embedding)
    }
    widths = {matrices[name][-1] for name in embeddings}
    # The output layer is the one matrix of that many rows that is in no layer.
    outputs = [
        name
        for name, shape in matrices.items()
        if shape[0] == vocabulary and name not in embeddings and not re.search(r"\.\d+\.", name)
    ]
    unit = 1.0 if outputs else TIED_OWN_LOGIT / max(widths)
    writers = {
        f"{path}.{list(projections_of(module))[-1]}.weight"
        for path, module in expert_modules(model).items()
    }

    def spread(name: str, shape: tuple[int, ...]) -> float:
        if name in embeddings:
            return unit
        # A depthwise convolution is [channels, kernel, 1]: it sums over the kernel.
        fan_in = shape[-1] if shape[-1] > 1 else math.prod(shape[1:])
        writes = name in writers or (len(shape) == 2 and shape[0] in widths)
        return (unit * BRANCH_GAIN if writes else 1.0) / math.sqrt(fan_in)

    return {name: spread(name, shape) for name, shape in matrices.items()}


def plan_tensors(
    model: nn.Module, spreads: Mapping[str, float], seed: int
) -> tuple[SyntheticTensor, ...]:
    """Every tensor of a lazily built and quantized model, in the model's order.

    `spreads` are those of the same model before it was quantized. Vectors, and what is not
    floating, stay as mlx-lm starts them; only these are evaluated.
    """
    modules = dict(model.named_modules())
    tensors = []
    for name, array in tree_flatten(model.parameters()):
        path, _, part = name.rpartition(".")
        module = modules.get(path)
        fill: Fill
        if module is not None and "scales" in module and part in ("weight", "scales", "biases"):
            fill = _packed(module, part, spreads[f"{path}.weight"])
        elif name in spreads:
            fill = Normal(spreads[name], array.dtype)
        else:
            fill = Kept(bytes(array_bytes(array)))
        spec = TensorSpec(name, dtype_name(array.dtype), tuple(array.shape))
        tensors.append(SyntheticTensor(spec, fill, seed))
    return tuple(tensors)


def _packed(module: nn.Module, part: str, spread: float) -> Fill:
    """Codes, scales or biases that make weights of mean 0 and standard deviation `spread`."""
    mode = getattr(module, "mode", "affine")
    if part == "weight":
        return Codes(CODE_MASKS.get(mode, ALL_BITS))
    if mode != "affine":
        return Constant(bytes([_nearest_scale(mode, module.bits, module.group_size, spread)]))
    largest = 2**module.bits - 1
    scale = spread / math.sqrt(largest * (largest + 2) / 12)
    value = scale if part == "scales" else -scale * largest / 2
    return Constant(bytes(array_bytes(mx.array([value], module[part].dtype))))


@cache
def _nearest_scale(mode: str, bits: int, group_size: int, spread: float) -> int:
    """The scale byte under which random codes come closest to `spread`, by MLX's own account."""
    codes = Codes(CODE_MASKS.get(mode, ALL_BITS))
    words = group_size * SAMPLED_GROUPS * bits // 32
    sample = codes.piece(np.random.default_rng(0), 0, 256 * words * 4)
    weight = mx.array(np.frombuffer(sample, np.uint32).reshape(256, words))
    scales = mx.repeat(mx.arange(256, dtype=mx.uint8)[:, None], SAMPLED_GROUPS, axis=1)
    values = mx.dequantize(weight, scales, None, group_size, bits, mode=mode).astype(mx.float32)
    found = mx.sqrt(mx.mean(values * values, axis=1))
    distance = mx.where((found > 0) & (found < 1e6), mx.abs(mx.log(found / spread)), mx.inf)
    return int(mx.argmin(distance).item())
