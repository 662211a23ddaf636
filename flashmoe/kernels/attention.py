"""Attention through the native CPU library, in float32.

mlx-lm's attention modules call `scaled_dot_product_attention` by a name of their own file. A
module gets a subclass of its class whose methods see another function by that name: nothing
changes for other models, other threads or mlx-lm itself, and whoever calls the model gets it.
What is not covered goes to mlx-lm's function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import base

from flashmoe import native
from flashmoe.base.clock import PhaseClock

NAME = "scaled_dot_product_attention"
# Fewer multiplications stay with MLX: leaving its graph costs more than they take.
LEAST_PRODUCTS = 1 << 17


def attend(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
    *,
    clock: PhaseClock | None = None,
) -> mx.array:
    """mlx-lm's `scaled_dot_product_attention`: [batch, heads, queries, v_dim]. Evaluates its
    arguments where the library takes over, which depends on shapes and dtypes alone; `clock`
    is told that this, and what it waits for, is computing."""
    if hasattr(cache, "bits") or not covers(queries, keys, values, mask, sinks):
        y: mx.array = base.scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
        )
        return y
    arrays = [array for array in (queries, keys, values) if isinstance(array, mx.array)]
    given = mask if isinstance(mask, mx.array) else None
    if given is not None and given.dtype != mx.bool_:
        given = given.astype(mx.float32)
    with (clock or PhaseClock()).during("computing"):
        mx.eval(arrays, [array for array in (given, sinks) if array is not None])
        rows = native.attend(
            *(np.array(array, copy=False) for array in arrays),
            scale=scale,
            causal=isinstance(mask, str),
            mask=None if given is None else np.array(given, copy=False),
            sinks=None if sinks is None else np.array(sinks.astype(mx.float32)),
        )
    return mx.array(rows).transpose(0, 2, 1, 3)


def covers(
    queries: mx.array, keys: Any, values: Any, mask: mx.array | str | None, sinks: Any
) -> bool:
    """Whether the library computes this, and is worth it."""
    arrays = (queries, keys, values)
    if any(not isinstance(a, mx.array) or a.ndim != 4 or a.dtype != mx.float32 for a in arrays):
        return False
    batch, heads, n_queries, k_dim = queries.shape
    kv_heads, n_keys, v_dim = values.shape[1:]
    if keys.shape != (batch, kv_heads, n_keys, k_dim) or values.shape[0] != batch:
        return False
    if heads % kv_heads or (isinstance(mask, str) and (mask != "causal" or n_queries > n_keys)):
        return False
    if isinstance(mask, mx.array) and mask.dtype not in (mx.bool_, mx.float32):
        return False
    if sinks is not None and sinks.shape != (heads,):
        return False
    return bool(batch * heads * n_queries * n_keys * (k_dim + v_dim) >= LEAST_PRODUCTS)


def replace_attention(model: nn.Module, function: Callable[..., mx.array] = attend) -> None:
    """Have `model` call `function` wherever its modules' methods call mlx-lm's."""
    made: dict[type, type | None] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in made:
            made[kind] = attending_class(kind, function)
        if made[kind] is not None:
            # Other modules may hold this very module, so it stays the one it is.
            object.__setattr__(module, "__class__", made[kind])


def attending_class(kind: type, function: Callable[..., mx.array] = attend) -> type | None:
    """A subclass of a module's class that attends with `function`, or None for a class whose
    methods do not call mlx-lm's."""
    methods: dict[str, Any] = {}
    for parent in reversed(kind.__mro__):
        for name, value in vars(parent).items():
            if isinstance(value, FunctionType) and _attends(value):
                methods[name] = _with_global(value, NAME, function)
            else:
                methods.pop(name, None)
    return type(kind.__name__, (kind,), methods) if methods else None


def _attends(function: FunctionType) -> bool:
    named = any(NAME in code.co_names for code in _codes(function.__code__))
    return named and function.__globals__.get(NAME) is base.scaled_dot_product_attention


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _with_global(function: FunctionType, name: str, value: Callable[..., Any]) -> FunctionType:
    """The function as it would be if its file had `value` by that name."""
    made = FunctionType(
        function.__code__,
        {**function.__globals__, name: value},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    made.__qualname__ = function.__qualname__
    return made
