"""Which of the native activations an expert module's activation is, found out by trying.

The activations of mlx-lm's families are written in many places under many names. What they
compute is what counts: a candidate is taken when it gives the same values on a grid that goes
past every limit in sight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe.native import Activation

# Of the larger of the two values, or absolute below 1.
TOLERANCE = 1e-5
_PROBES = (0.0, 1e-3, 0.1, 0.4, 0.9, 1.3, 2.1, 3.3, 5.2, 8.5, 14.0, 30.0, 90.0)

Floats = npt.NDArray[np.float64]


def recognize(activation: Callable[..., mx.array], gated: bool) -> Activation | None:
    """The native activation that equals `activation(up, gate)`, or `activation(up)` ungated.

    Limits and slopes are looked for among the numbers that the module carries. None when
    nothing fits; then the module itself has to be called.
    """
    numbers = _numbers(activation)
    values = sorted({s * p for s in (-1, 1) for p in (*_PROBES, *(1.5 * n for n in numbers))})
    grid = np.array(values, np.float32)
    up, gate = (np.ravel(a) for a in np.meshgrid(grid, grid))
    inputs = (up, gate) if gated else (gate,)
    expected = np.array(activation(*(mx.array(a) for a in inputs)), np.float64)
    wide_up, wide_gate = up.astype(np.float64), gate.astype(np.float64)
    for candidate in _candidates(numbers, gated):
        found = evaluate(candidate, wide_gate, wide_up if gated else None)
        error = np.abs(found - expected) / np.maximum(np.abs(expected), 1.0)
        if error.max() < TOLERANCE:
            return candidate
    return None


def evaluate(activation: Activation, gate: Floats, up: Floats | None = None) -> Floats:
    """What the native library computes, in float64: `gate` and `up` of one shape."""
    g = np.minimum(gate, activation.gate_max)
    if activation.kind == "sigmoid":
        a = g * _sigmoid(activation.alpha * g)
    elif activation.kind == "gelu_tanh":
        a = g * _sigmoid(2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))
    elif activation.kind == "situ":
        a = activation.alpha * np.tanh(g / activation.alpha) * _sigmoid(g)
    else:
        a = np.maximum(g, 0.0) ** 2
    a = np.minimum(a, activation.activated_max)
    if up is None:
        return a
    u = np.clip(up, -activation.up_max, activation.up_max)
    if math.isfinite(activation.up_bound):
        u = activation.up_bound * np.tanh(u / activation.up_bound)
    return a * (u + activation.up_shift)


def _candidates(numbers: list[float], gated: bool) -> Iterator[Activation]:
    slopes = [1.0, *numbers]
    yield Activation("gelu_tanh")
    yield Activation("relu2")
    for alpha in slopes:
        yield Activation("sigmoid", alpha)
    if not gated:
        return
    for alpha, bound in itertools.product(slopes, (math.inf, *numbers)):
        yield Activation("situ", alpha, up_bound=bound)
    for alpha, limit, shift in itertools.product(slopes, numbers, (0.0, 1.0)):
        yield Activation("sigmoid", alpha, gate_max=limit, up_max=limit, up_shift=shift)
        yield Activation("sigmoid", alpha, activated_max=limit, up_max=limit, up_shift=shift)


def _numbers(activation: Callable[..., mx.array]) -> list[float]:
    """The positive, finite numbers among a module's attributes."""
    held: dict[str, Any] = {**getattr(activation, "__dict__", {})}
    return [float(v) for v in held.values() if type(v) in (int, float) and 0 < v < math.inf]


def _sigmoid(x: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(np.minimum(-x, 700.0)))
