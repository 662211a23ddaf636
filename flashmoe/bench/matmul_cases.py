"""What `bench kernels` times: products with packed matrices, and copies of memory.

Knows how to do a thing once; not how often, nor what is made of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe import native
from flashmoe.base.errors import OptionError
from flashmoe.kernels.contract import ProjectionPacking

# What MLX has in any mode; some of the values it is not given to check end the process.
BITS = (1, 2, 3, 4, 5, 6, 8)
GROUP_SIZES = (16, 32, 64, 128)
# Random weights are drawn for this many outputs and then repeated.
SAMPLE_OUTPUTS = 128


@dataclass(frozen=True)
class Shape:
    """A weight matrix [outputs, inputs]; `routed` ones are multiplied many at a time, by slot.

    `experts`: two such matrices and one the other way round, with an activation between them.
    """

    name: str
    inputs: int
    outputs: int
    routed: bool = True
    experts: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * (3 if self.experts else 1)


@dataclass(frozen=True)
class Subject:
    """Something to time.

    `run(turn)` makes `products` multiplications with weights of `bytes_moved` bytes. `turn` counts
    the calls of all subjects that take turns: each call takes the next part of what they share.
    """

    kernel: str
    device: str
    products: int
    bytes_moved: int
    run: Callable[[int], None]


class PackedMatrix(NamedTuple):
    """What `mx.quantize` returns, of one matrix [outputs, ...] or several [n, outputs, ...]."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None = None

    def map(self, change: Callable[[mx.array], mx.array]) -> PackedMatrix:
        """The changed arrays, unevaluated."""
        biases = None if self.biases is None else change(self.biases)
        return PackedMatrix(change(self.weight), change(self.scales), biases)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self if array is not None)


@dataclass(frozen=True)
class WorkingSet:
    """Matrices [n_slots, outputs, ...] of one shape, and the most products that a call makes."""

    shape: Shape
    packing: ProjectionPacking
    packed: PackedMatrix
    n_slots: int
    products_per_call: int

    @classmethod
    def random(
        cls, shape: Shape, packing: ProjectionPacking, least_bytes: int, products_per_call: int
    ) -> WorkingSet:
        """As many slots as take `least_bytes`."""
        n_sampled = math.gcd(shape.outputs, SAMPLE_OUTPUTS)
        values = mx.random.normal((n_sampled, shape.inputs), key=mx.random.key(0))
        sample = PackedMatrix(*mx.quantize(values, packing.group_size, packing.bits, packing.mode))
        repeats = shape.outputs // n_sampled
        n_slots = -(-least_bytes // (repeats * sample.nbytes))

        def fill(array: mx.array) -> mx.array:
            return mx.tile(array, (n_slots * repeats, 1)).reshape(n_slots, shape.outputs, -1)

        packed = sample.map(fill)
        mx.eval(packed)
        return cls(shape, packing, packed, n_slots, products_per_call)

    def subjects(self, rows: int, isas: Sequence[str]) -> list[Subject]:
        """MLX's op, then the native kernel on each instruction set, with `rows` rows a matrix.

        A call takes as many routed matrices as make `products_per_call`, or one other matrix; one
        that alone makes more is cut into even parts of its outputs.
        """
        inputs, outputs = self.shape.inputs, self._outputs_at_once(rows)
        slots = self.packed.map(lambda array: array.reshape(-1, outputs, array.shape[-1]))
        mx.eval(slots)
        n_slots = len(slots.weight)
        products = rows * inputs * outputs
        n = min(max(1, self.products_per_call // products), n_slots) if self.shape.routed else 1
        x = np.random.default_rng(1).standard_normal((n * rows, inputs), np.float32)
        x_by_slot = mx.array(x).reshape(n, rows, inputs)
        mx.eval(x_by_slot)
        y = np.empty((n * rows, outputs), np.float32)
        packing = vars(self.packing)

        def taken(turn: int) -> npt.NDArray[np.int32]:
            return ((turn * n + np.arange(n)) % n_slots).astype(np.int32)

        def gather_qmm(turn: int) -> None:
            ids = mx.array(taken(turn))
            mx.eval(mx.gather_qmm(x_by_slot, *slots, rhs_indices=ids, **packing))

        def quantized_matmul(turn: int) -> None:
            part = slots.map(lambda array: array[turn % n_slots])
            mx.eval(mx.quantized_matmul(x_by_slot[0], *part, **packing))

        def multiply(isa: str, matrix: native.Matrix, turn: int) -> None:
            native.use_isa(isa)
            native.matmul(x, matrix, np.repeat(taken(turn), rows), out=y)

        op = gather_qmm if self.shape.routed else quantized_matmul
        subject = partial(Subject, products=n * products, bytes_moved=n * slots.nbytes // n_slots)
        subjects = [subject(f"mlx {op.__name__}", device_name(), run=op)]
        if isas:
            matrix = native.matrix(*slots, **packing)
            subjects += [
                subject(f"native {isa}", "cpu", run=partial(multiply, isa, matrix)) for isa in isas
            ]
        return subjects

    def _outputs_at_once(self, rows: int) -> int:
        outputs = self.shape.outputs
        if self.shape.routed:
            return outputs
        most = max(1, self.products_per_call // (rows * self.shape.inputs))
        return next(n for n in range(min(most, outputs), 0, -1) if outputs % n == 0)


def copying(copied_bytes: int, pool: Executor, threads: int) -> Subject:
    """Copies between two halves of `copied_bytes`, where MLX computes; all of these are moved:
    read, or written. On a CPU `threads` of the pool share them."""
    if device_name() == "gpu":
        words = mx.ones(copied_bytes // 8, mx.uint32)
        mx.eval(words)
        return Subject("copy", "gpu", 0, 2 * words.nbytes, lambda turn: mx.eval(words + turn))
    source = np.ones(copied_bytes // 2, np.uint8)
    target = np.zeros_like(source)
    cuts = np.linspace(0, len(source), threads + 1).astype(int)
    parts = [slice(start, end) for start, end in pairwise(cuts)]

    def copy(part: slice) -> None:
        np.copyto(target[part], source[part])

    def run(turn: int) -> None:
        list(pool.map(copy, parts))

    return Subject("copy", "cpu", 0, source.nbytes + target.nbytes, run)


def resolve_packing(mode: str, bits: int | None, group_size: int | None) -> ProjectionPacking:
    """Bits and group size as given, or the mode's own.

    Raises OptionError for a packing that MLX lacks.
    """
    for name, value, allowed in (("bits", bits, BITS), ("group size", group_size, GROUP_SIZES)):
        if value is not None and value not in allowed:
            raise OptionError(f"{name} must be one of {list(allowed)}, not {value}")
    width = 512
    try:
        weight, scales, *_ = mx.quantize(mx.zeros((32, width)), group_size, bits, mode)
    except ValueError as error:
        raise OptionError(f"MLX cannot pack weights so: {error}") from None
    return ProjectionPacking(
        bits=weight.shape[-1] * 32 // width, group_size=width // scales.shape[-1], mode=mode
    )


def device_name() -> str:
    """Where MLX's operations run: cpu or gpu."""
    return "cpu" if mx.default_device() == mx.cpu else "gpu"
