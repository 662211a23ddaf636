"""How a few rows of a parameter follow from a few rows of the source's tensors.

A row is an index of the first axis: an expert of a stacked projection, an output of a linear
layer. A request for rows is handed down through the operations of a `sanitize` (`graph.py`) for
as long as these treat rows apart, so that one expert of a fused tensor needs that expert's bytes
and no others. An operation that mixes rows asks for all of its input.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from flashmoe.repacking.row_node import Apply, RowNode
from flashmoe.repacking.sanitize_graph import Graph, Operation

UNARY: dict[str, Apply] = {"Negative": mx.negative, "Exp": mx.exp}
BINARY: dict[str, Apply] = {
    "Add": mx.add,
    "Subtract": mx.subtract,
    "Multiply": mx.multiply,
    "Divide": mx.divide,
    "Maximum": mx.maximum,
    "Minimum": mx.minimum,
}
AFFINE = 0


class UnknownOperation(Exception):
    """An operation that cannot be taken apart by rows; its text is the operation's name."""


def rows(graph: Graph, value: str, begin: int, end: int) -> RowNode:
    """Rows `begin` to `end` of a value of the graph.

    Raises UnknownOperation when they depend on an operation that this does not know.
    """
    if value in graph.leaves:
        name = graph.leaves[value]
        stand_in = graph.stand_ins.get(name)
        return stand_in.rows(begin, end) if stand_in else RowNode(name, begin, end)
    if value in graph.constants:
        constant = graph.constants[value]
        part = constant[begin:end] if constant.ndim else constant
        return RowNode(apply=lambda: part, moves=False)
    operation = graph.operations[value]
    request = _Request(graph, operation, value, begin, end)
    if operation.name in UNARY:
        return request.map(UNARY[operation.name])
    if operation.name in BINARY:
        return request.map(BINARY[operation.name])
    rule = _RULES.get(operation.name)
    if rule is None:
        raise UnknownOperation(operation.name)
    return rule(request)


@dataclass(frozen=True)
class _Request:
    graph: Graph
    operation: Operation
    value: str
    begin: int
    end: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.graph.arrays[self.value].shape

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of what is asked for."""
        return (self.end - self.begin, *self.shape[1:]) if self.shape else ()

    @property
    def argument(self) -> Any:
        return self.operation.arguments[0]

    def shape_of(self, index: int = 0) -> tuple[int, ...]:
        return self.graph.arrays[self.operation.inputs[index]].shape

    def input(self, begin: int, end: int, index: int = 0) -> RowNode:
        return rows(self.graph, self.operation.inputs[index], begin, end)

    def all_of(self, index: int = 0) -> RowNode:
        shape = self.shape_of(index)
        return self.input(0, shape[0] if shape else 1, index)

    def map(self, apply: Apply, moves: bool = False) -> RowNode:
        """`apply` over the same rows of every input; one with fewer axes, or a single row for
        all, is given whole."""
        inputs = []
        for index in range(len(self.operation.inputs)):
            shape = self.shape_of(index)
            has_rows = len(shape) == len(self.shape) and shape[:1] == self.shape[:1]
            inputs.append(
                self.input(self.begin, self.end, index) if has_rows else self.all_of(index)
            )
        return RowNode(apply=apply, inputs=tuple(inputs), moves=moves)

    def cut(self, apply: Apply) -> RowNode:
        """The rows cut out of `apply` over the whole first input."""
        begin, end = self.begin, self.end
        if end - begin == (self.shape[0] if self.shape else 1):
            return RowNode(apply=apply, inputs=(self.all_of(),), moves=False)
        return RowNode(
            apply=lambda array: apply(array)[begin:end], inputs=(self.all_of(),), moves=False
        )


def _reshaped(request: _Request) -> RowNode:
    """Reshape, Flatten, ExpandDims, Squeeze: the same bytes in another shape."""
    part, shape = request.part, request.shape_of()
    n_inside = math.prod(shape[1:])
    n_outside = math.prod(request.shape[1:])
    begin, end = request.begin * n_outside, request.end * n_outside
    if n_inside == 0 or begin % n_inside or end % n_inside:
        return request.cut(lambda array: array.reshape(request.shape))
    return RowNode(
        apply=lambda array: array.reshape(part),
        inputs=(request.input(begin // n_inside, end // n_inside),),
    )


def _viewed(request: _Request) -> RowNode:
    dtype = request.argument
    if len(request.shape) < 2:
        return request.cut(lambda array: array.view(dtype))
    return request.map(lambda array: array.view(dtype), moves=True)


def _transposed(request: _Request) -> RowNode:
    axes = list(request.argument)
    if not axes or axes[0] == 0:
        return request.map(lambda array: array.transpose(axes))
    return request.cut(lambda array: array.transpose(axes))


def _sliced(request: _Request) -> RowNode:
    start, stop, strides = request.operation.arguments
    inner = tuple(slice(*bounds) for bounds in zip(start, stop, strides, strict=True))
    if not inner or strides[0] != 1:
        return request.cut(lambda array: array[inner])
    rest = (slice(None), *inner[1:])
    first = start[0]
    whole = all(
        (s.start, s.stop, s.step) == (0, n, 1)
        for s, n in zip(inner[1:], request.shape_of()[1:], strict=True)
    )
    return RowNode(
        apply=lambda array: array[rest],
        inputs=(request.input(first + request.begin, first + request.end),),
        moves=whole,
    )


def _split(request: _Request) -> RowNode:
    indices, axis = request.operation.arguments
    which = request.operation.outputs.index(request.value)
    bounds = [0, *indices, request.shape_of()[axis]]
    if axis == 0:
        first = bounds[which]
        return RowNode(
            apply=lambda array: array,
            inputs=(request.input(first + request.begin, first + request.end),),
        )
    part = (slice(None),) * axis + (slice(bounds[which], bounds[which + 1]),)
    return request.map(lambda array: array[part])


def _concatenated(request: _Request) -> RowNode:
    axis = request.argument
    if axis != 0:
        return request.map(lambda *arrays: mx.concatenate(list(arrays), axis))
    bounds = request.graph.joints[request.value]
    inputs = []
    # There may be hundreds of parts, a few of which have the rows.
    for index in range(bisect.bisect_right(bounds, request.begin) - 1, len(bounds) - 1):
        first, last = bounds[index], bounds[index + 1]
        if first >= request.end:
            break
        begin, end = max(request.begin, first), min(request.end, last)
        if begin < end:
            inputs.append(request.input(begin - first, end - first, index))
    if len(inputs) == 1:
        return inputs[0]
    return RowNode(
        apply=lambda *arrays: mx.concatenate(list(arrays)), inputs=tuple(inputs), moves=False
    )


def _cast(request: _Request) -> RowNode:
    dtype = request.argument
    return request.map(lambda array: array.astype(dtype))


def _broadcast(request: _Request) -> RowNode:
    part = request.part
    return request.map(lambda array: mx.broadcast_to(array, part))


def _quantized(request: _Request) -> RowNode:
    group_size, bits, mode, dequantize = request.operation.arguments
    if mode != AFFINE or len(request.shape) < 2:
        raise UnknownOperation("Quantize")
    if dequantize:
        return request.map(
            lambda weight, scales, biases: mx.dequantize(
                weight, scales, biases, group_size=group_size, bits=bits
            )
        )
    which = request.operation.outputs.index(request.value)
    return request.map(lambda array: mx.quantize(array, group_size=group_size, bits=bits)[which])


_RULES: dict[str, Callable[[_Request], RowNode]] = {
    "AsType": _cast,
    "Broadcast": _broadcast,
    "Concatenate": _concatenated,
    "ExpandDims": _reshaped,
    "Flatten": _reshaped,
    "Quantize": _quantized,
    "Reshape": _reshaped,
    "Slice": _sliced,
    "Split": _split,
    "Squeeze": _reshaped,
    "Transpose": _transposed,
    "Unflatten": _reshaped,
    "View": _viewed,
}
