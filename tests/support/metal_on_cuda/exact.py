"""Routed experts in float64, from the definition of MLX's packings and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe.kernels.activations import evaluate, recognize
from flashmoe.kernels.contract import ProjectionPacking
from flashmoe.kernels.self_check import Case

Floats = npt.NDArray[np.float64]

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)


def experts_in_float64(
    case: Case, weights: Mapping[str, mx.array], x: mx.array, slots: npt.NDArray[np.int32]
) -> tuple[Floats, Floats]:
    """hidden [n_pairs, N] and y [n_pairs, d_out], for x [n_tokens, d_in], slots [n_tokens, k]."""
    hidden = hidden_in_float64(case, weights, x, slots)
    return hidden, down_in_float64(case, weights, hidden, slots)


def hidden_in_float64(
    case: Case, weights: Mapping[str, mx.array], x: mx.array, slots: npt.NDArray[np.int32]
) -> Floats:
    """activation(Wg x, Wu x), or activation(Wu x), of every pair: [n_pairs, N]."""
    gated = case.spec.kind == "SwitchGLU"
    activation = recognize(case.spec.activation, gated)
    assert activation is not None
    rows = np.repeat(wide(x), slots.shape[-1], axis=0)
    if not gated:
        return evaluate(activation, _product("fc1", case, weights, rows, slots))
    gate, up = (_product(f"{name}_proj", case, weights, rows, slots) for name in ("gate", "up"))
    return evaluate(activation, gate, up)


def down_in_float64(
    case: Case, weights: Mapping[str, mx.array], hidden: Floats, slots: npt.NDArray[np.int32]
) -> Floats:
    """Wd hidden of every pair: [n_pairs, d_out]."""
    name = "down_proj" if case.spec.kind == "SwitchGLU" else "fc2"
    return _product(name, case, weights, hidden, slots)


def _product(
    name: str,
    case: Case,
    weights: Mapping[str, mx.array],
    inputs: Floats,
    slots: npt.NDArray[np.int32],
) -> Floats:
    pairs, packing = slots.reshape(-1), case.spec.packing.get(name)
    held = {key: array for key, array in weights.items() if key.startswith(f"{name}.")}
    rows = held[f"{name}.weight"].shape[1]
    y = np.empty((len(pairs), rows))
    for slot in np.unique(pairs).tolist():
        # One at a time: a bank in float64 is large.
        expert = {key: array[slot : slot + 1] for key, array in held.items()}
        y[pairs == slot] = inputs[pairs == slot] @ dense_weights(name, expert, packing)[0].T
    bias = held.get(f"{name}.bias")
    return y if bias is None else y + wide(bias)[pairs]


def dense_weights(
    name: str, weights: Mapping[str, mx.array], packing: ProjectionPacking | None
) -> Floats:
    """The matrices [n_slots, rows, cols] that MLX's packing stands for."""
    weight = weights[f"{name}.weight"]
    if packing is None:
        return wide(weight)
    stream = np.unpackbits(np.array(weight).view(np.uint8), axis=-1, bitorder="little")
    bits = stream.reshape(*weight.shape[:2], -1, packing.bits)
    codes = bits @ (1 << np.arange(packing.bits)).astype(np.uint8)
    scales = weights[f"{name}.scales"]
    if packing.mode == "mxfp4":
        values = np.where(codes >= 8, -1.0, 1.0) * _E2M1[codes & 7]
        powers = 2.0 ** (np.array(scales, np.float64) - 127)
        return values * np.repeat(powers, packing.group_size, axis=-1)
    steps, starts = (
        np.repeat(wide(weights[f"{name}.{tensor}"]), packing.group_size, axis=-1)
        for tensor in ("scales", "biases")
    )
    return codes * steps + starts


def wide(array: mx.array) -> Floats:
    return np.array(array.astype(mx.float32), np.float64)


def row_error(found: Floats, expected: Floats) -> float:
    """The largest distance of a row, relative to its norm; NaN and infinity are infinitely far."""
    assert found.shape == expected.shape
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(np.where(np.isfinite(error), error, np.inf).max())
