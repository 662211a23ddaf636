"""One product per expert, against the reference; on whatever device MLX computes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from flashmoe.kernels import grouped, reference
from flashmoe.kernels.check_cases import make_case
from flashmoe.kernels.contract import ProjectionPacking, Slots
from flashmoe.native import Activation
from tests.support.metals import row_error, wide

# The same products in the same dtype; on GPUs in another order.
TOLERANCE = {mx.float32: 3e-6, mx.bfloat16: 3e-2}

PACKINGS = [
    ProjectionPacking(4, 64, "affine"),
    ProjectionPacking(3, 32, "affine"),
    ProjectionPacking(4, 32, "mxfp4"),
    ProjectionPacking(8, 32, "mxfp8"),
    None,
]


def routed(n_tokens: int, top_k: int, n_slots: int) -> tuple[mx.array, Slots]:
    rng = np.random.default_rng(n_tokens)
    x = mx.array(rng.standard_normal((n_tokens, 64), np.float32))
    return x, rng.integers(0, n_slots, (n_tokens, top_k), np.int32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_groups_equal_the_reference(
    packing: ProjectionPacking | None, dtype: mx.Dtype, gated: bool
) -> None:
    if packing is None and dtype == mx.bfloat16 and mx.default_device() == mx.cpu:
        # The reference has no such product there.
        return
    case = make_case(
        dtype, packing, d_in=64, hidden=128, bias=True, gated=gated,
        activation=None if gated else Activation("relu2"),
    )  # fmt: skip
    weights = case.random_weights(n_slots=6)
    if packing is not None and packing.mode == "mxfp8":
        for name in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2"):
            weights.pop(f"{name}.biases", None)
            if f"{name}.scales" in weights:
                shape = weights[f"{name}.scales"].shape
                weights[f"{name}.scales"] = mx.full(shape, 110, mx.uint8)
                packed = weights[f"{name}.weight"]
                # Neither infinite nor NaN in e4m3.
                weights[f"{name}.weight"] = mx.bitwise_and(packed, 0xBFBFBFBF)
    forward = grouped.bind_experts(weights, case.spec)
    twin = reference.bind_experts(weights, case.spec)
    for shape in [(1, 1), (17, 1), (40, 3)]:
        x, slots = routed(*shape, n_slots=6)
        y, expected = forward(x.astype(dtype), slots), twin(x.astype(dtype), slots)
        assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
        assert row_error(wide(y), wide(expected)) < TOLERANCE[dtype]


def test_shapes_of_a_batch() -> None:
    case = make_case(mx.float32, None, d_in=64, hidden=64)
    weights = case.random_weights()
    x, slots = routed(12, 2, n_slots=3)
    y = grouped.bind_experts(weights, case.spec)(x, slots)
    batch = grouped.bind_experts(weights, case.spec)(x.reshape(2, 6, 64), slots.reshape(2, 6, 2))
    assert mx.array_equal(batch, y.reshape(2, 6, 2, 64))


def test_slots_and_the_bank_do_not_matter() -> None:
    """The same experts in other slots of a larger bank: the same bits."""
    case = make_case(mx.float32, ProjectionPacking(4, 64, "affine"), d_in=64, hidden=128)
    weights = case.random_weights(n_slots=4)
    x, slots = routed(60, 2, n_slots=4)
    order = np.array([3, 3, 1, 0, 2, 2, 1, 1, 0])
    moved = {name: mx.contiguous(array[mx.array(order)]) for name, array in weights.items()}
    place = np.array([np.flatnonzero(order == slot)[-1] for slot in range(4)], np.int32)
    y = grouped.bind_experts(weights, case.spec)(x, slots)
    assert mx.array_equal(grouped.bind_experts(moved, case.spec)(x, place[slots]), y)


def test_slots_are_not_copied() -> None:
    """What is written into a bank's memory after binding is what is multiplied."""
    case = make_case(mx.float32, None, d_in=64, hidden=64)
    weights = case.random_weights()
    forward = grouped.bind_experts(weights, case.spec)
    x, slots = routed(10, 1, n_slots=3)
    before = forward(x, slots)
    mx.eval(before)
    memory = np.array(weights["down_proj.weight"], copy=False)
    memory[...] *= 2
    assert mx.allclose(forward(x, slots), 2 * before)
