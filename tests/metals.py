"""What tests of the Metal kernels share: the harness in MLX's place, and experts in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from metal_on_cpu import metal_kernel

from flashmoe.kernels import metal, metal_experts
from flashmoe.kernels.activations import evaluate, recognize
from flashmoe.kernels.contract import ProjectionPacking
from flashmoe.kernels.metal_source import METAL_FOLDER, KernelSource
from flashmoe.kernels.self_check import Case

Floats = npt.NDArray[np.float64]

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)


@contextmanager
def harness(folder: Path = METAL_FOLDER) -> Iterator[None]:
    """Within it, the kernels of `folder` run on the CPU, under watch."""
    built = {}

    def build(kernel: KernelSource) -> object:
        if kernel not in built:
            names = (f"flashmoe_{kernel.name}", kernel.inputs, kernel.outputs)
            built[kernel] = metal_kernel(*names, kernel.body, kernel.header(folder))
        return built[kernel]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metal, "build", build)
        # Here MLX's arrays begin anywhere; the harness puts each at a place of its own.
        patch.setattr(metal_experts, "address", lambda array: 0)
        yield


def experts_in_float64(
    case: Case, weights: dict[str, mx.array], x: mx.array, slots: npt.NDArray[np.int32]
) -> tuple[Floats, Floats]:
    """hidden [n_pairs, N] and y [n_pairs, d_out], for x [n_tokens, d_in], slots [n_tokens, k]."""
    gated = case.spec.kind == "SwitchGLU"
    activation = recognize(case.spec.activation, gated)
    assert activation is not None
    pairs = slots.reshape(-1)
    rows = np.repeat(wide(x), slots.shape[-1], axis=0)

    def product(name: str, inputs: Floats) -> Floats:
        dense = dense_weights(name, weights, case.spec.packing.get(name))
        y = np.einsum("prc,pc->pr", dense[pairs], inputs)
        bias = weights.get(f"{name}.bias")
        return y if bias is None else y + wide(bias)[pairs]

    if gated:
        hidden = evaluate(activation, product("gate_proj", rows), product("up_proj", rows))
        return hidden, product("down_proj", hidden)
    hidden = evaluate(activation, product("fc1", rows))
    return hidden, product("fc2", hidden)


def dense_weights(
    name: str, weights: dict[str, mx.array], packing: ProjectionPacking | None
) -> Floats:
    """The matrices [n_slots, rows, cols] that MLX's packing stands for."""
    weight = weights[f"{name}.weight"]
    if packing is None:
        return wide(weight)
    stream = np.unpackbits(np.array(weight).view(np.uint8), axis=-1, bitorder="little")
    bits = stream.reshape(*weight.shape[:2], -1, packing.bits).astype(np.int64)
    codes = (bits << np.arange(packing.bits)).sum(axis=-1)
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
