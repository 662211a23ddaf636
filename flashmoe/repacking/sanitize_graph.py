"""What a family's `sanitize` does to a checkpoint's tensors, as a graph of MLX's operations.

mlx-lm names, splits, stacks and turns a checkpoint's tensors in code, one method per family.
Run over placeholders, that code yields arrays that nobody evaluates; the operations between the
placeholders and these say how any row of a model's parameter follows from the source.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import mlx.core as mx

from flashmoe.base.dtypes import dtype_name
from flashmoe.repacking.formats.contract import StandIn

Weights = dict[str, mx.array]


@dataclass(frozen=True, slots=True)
class Array:
    """A value in the graph; `dtype` is a safetensors name."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Operation:
    """One of MLX's operations: its name, what it is given beside arrays, its values."""

    name: str
    arguments: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """`targets` are parameters by name, `leaves` the source's tensors by value, some of which
    are `stand_ins` (by name) that a format presents; every value that is neither a leaf nor a
    constant has the operation that it comes from."""

    targets: dict[str, str]
    leaves: dict[str, str]
    arrays: dict[str, Array]
    operations: dict[str, Operation]
    constants: dict[str, mx.array]
    stand_ins: Mapping[str, StandIn] = field(default_factory=dict)

    @cached_property
    def joints(self) -> dict[str, list[int]]:
        """For every value that is a concatenation of rows: the row at which each part begins, and
        the number of rows at the end."""
        return {
            value: [0, *accumulate(self.arrays[part].shape[0] for part in operation.inputs)]
            for value, operation in self.operations.items()
            if operation.name == "Concatenate" and operation.arguments[0] == 0
        }


def trace(
    sanitize: Callable[[Weights], Mapping[str, mx.array]],
    weights: Weights,
    stand_ins: Mapping[str, StandIn] | None = None,
) -> Graph | None:
    """The graph of `sanitize` over `weights`, of which nothing is evaluated.

    None when it cannot be had: `sanitize` looks at values, or uses an operation that MLX does
    not export.
    """
    names = list(weights)
    results: list[str] = []
    parts: dict[str, list[Any]] = {"primitive": [], "constants": []}

    def run(*leaves: mx.array) -> list[mx.array]:
        sanitized = sanitize(dict(zip(names, leaves, strict=True)))
        results[:] = list(sanitized)
        return list(sanitized.values())

    def note(event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "primitive":
            parts[kind].append(event)
        else:
            parts[kind] = event.get(kind, [])

    try:
        with _exportable():
            mx.export_function(note, run, *weights.values())
        return replace(_graph(names, results, parts), stand_ins=stand_ins or {})
    except (ValueError, RuntimeError, KeyError):
        return None


@contextlib.contextmanager
def _exportable() -> Iterator[None]:
    """Leaves out `mx.contiguous`, which MLX cannot export and which changes no value."""

    def unchanged(array: mx.array, *_: Any, **__: Any) -> mx.array:
        return array

    contiguous = mx.contiguous
    mx.contiguous = unchanged
    try:
        yield
    finally:
        mx.contiguous = contiguous


def _graph(names: list[str], results: list[str], parts: dict[str, list[Any]]) -> Graph:
    arrays: dict[str, Array] = {}
    operations: dict[str, Operation] = {}

    def learn(values: list[Any]) -> tuple[str, ...]:
        for value, shape, dtype in values:
            arrays[value] = Array(tuple(shape), dtype_name(dtype))
        return tuple(value for value, _, _ in values)

    inputs = learn(parts["inputs"])
    outputs = learn(parts["outputs"])
    for event in parts["primitive"]:
        produced = learn(event["outputs"])
        operation = Operation(
            event["name"], tuple(event["arguments"]), learn(event["inputs"]), produced
        )
        operations.update(dict.fromkeys(produced, operation))
    constants = dict(parts["constants"])
    for value, constant in constants.items():
        arrays[value] = Array(tuple(constant.shape), dtype_name(constant.dtype))
    return Graph(
        targets=dict(zip(results, outputs, strict=True)),
        leaves=dict(zip(inputs, names, strict=True)),
        arrays=arrays,
        operations=operations,
        constants=constants,
    )
