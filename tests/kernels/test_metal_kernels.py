"""The Metal kernels, run under watch, against float64: every packing, dtype and shape."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from flashmoe import native
from flashmoe.kernels import cpu, metal, reference
from flashmoe.kernels.activations import evaluate
from flashmoe.kernels.check_cases import BITS, GATED, GROUPS, UNGATED, make_case
from flashmoe.kernels.contract import ProjectionPacking
from flashmoe.kernels.metal_experts import describe_experts
from flashmoe.kernels.self_check import Case
from flashmoe.native import Activation
from tests.support.metal_on_cpu import compiled
from tests.support.metals import dense_weights, experts_in_float64, harness, row_error, wide

N_SLOTS = 5
# Everything in between is float32, whatever x and the weights are.
FLOAT32_TOLERANCE = 3e-6

# Of a row's norm: what rounding the result to its dtype can do.
ROUNDING = {mx.float32: FLOAT32_TOLERANCE, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
DTYPES = tuple(ROUNDING)

# (tokens, top-k), walked through by the cases.
CALLS = [(1, 1), (1, 10), (8, 1), (2, 3), (1, 8), (3, 2), (5, 1), (1, 4), (7, 1), (2, 5)]

PACKINGS = [
    *(ProjectionPacking(bits, group, "affine") for bits in BITS for group in GROUPS),
    *(ProjectionPacking(4, 32, "mxfp4") for _ in DTYPES),
    *(None for _ in DTYPES),
]
FOUR = ProjectionPacking(4, 64, "affine")
THREE = ProjectionPacking(3, 32, "affine")


def compare(case: Case, n_tokens: int, top_k: int, *, scored: bool = False) -> None:
    """Each kernel, and both behind `bind_experts`; slots in any order and repeated."""
    weights = case.random_weights(N_SLOTS)
    rng = np.random.default_rng([n_tokens, top_k])
    x = mx.array(rng.standard_normal((n_tokens, case.d_in), np.float32)).astype(case.dtype)
    slots = rng.integers(0, N_SLOTS, (n_tokens, top_k), np.int32)
    expected_hidden, expected = experts_in_float64(case, weights, x, slots)
    with harness():
        experts = describe_experts(weights, case.spec)
        assert experts is not None
        routing = metal.RoutedSlots.of(slots)
        hidden = metal.expert_gate_up(x, routing, experts)
        assert hidden.dtype == mx.float32
        assert row_error(wide(hidden), expected_hidden) < FLOAT32_TOLERANCE
        y = metal.bind_experts(weights, case.spec)(x, slots)
        assert (y.shape, y.dtype) == ((n_tokens, top_k, case.d_in), case.dtype)
        assert row_error(wide(y).reshape(expected.shape), expected) < ROUNDING[case.dtype]
        if scored:
            scores = rng.uniform(0.1, 1.0, (n_tokens, top_k)).astype(np.float32)
            sums = metal.expert_down(hidden, routing, experts, case.dtype, mx.array(scores))
            weighted = np.einsum("tkd,tk->td", expected.reshape(y.shape), scores)
            assert sums.dtype == case.dtype
            assert row_error(wide(sums), weighted) < ROUNDING[case.dtype]


@pytest.mark.parametrize("index", range(len(PACKINGS)))
@compiled
def test_packings(index: int) -> None:
    """Bits with groups, bits with dtypes, groups with dtypes: every pair comes up."""
    packing = PACKINGS[index]
    width = packing.group_size if packing else 24
    dtype = DTYPES[(index + index // 3) % 3]
    case = make_case(dtype, packing, d_in=3 * width, hidden=5 * width, bias=index % 4 == 0)
    compare(case, *CALLS[index % len(CALLS)], scored=index % 5 == 1)


@compiled
def test_every_number_of_tokens_and_experts() -> None:
    case = make_case(mx.bfloat16, FOUR, d_in=64, hidden=64)
    for n_tokens in range(1, 9):
        compare(case, n_tokens, 1 + n_tokens % 3, scored=True)
    for top_k in range(1, 11):
        compare(case, 1, top_k, scored=True)


@pytest.mark.parametrize("index", range(len(GATED)))
@compiled
def test_gated_activations(index: int) -> None:
    case = make_case(DTYPES[index % 3], FOUR, d_in=64, hidden=64, activation=GATED[index])
    compare(case, *CALLS[index])


@pytest.mark.parametrize("index", range(len(UNGATED)))
@compiled
def test_activations_without_a_gate(index: int) -> None:
    case = make_case(
        DTYPES[index], FOUR, d_in=64, hidden=64, activation=UNGATED[index], gated=False, bias=True
    )
    compare(case, 2, 3, scored=True)


# Rows that end within a chunk, on its end, and just behind it; 8, 16 and 32 lanes for a row.
@pytest.mark.parametrize("d_in,hidden", [(2080, 32), (1024, 512), (512, 1056), (960, 1536)])
@compiled
def test_widths(d_in: int, hidden: int) -> None:
    compare(make_case(mx.bfloat16, THREE, d_in=d_in, hidden=hidden), 1, 2, scored=True)


@pytest.mark.parametrize("d_in,hidden", [(1032, 8), (8, 2056)])
@compiled
def test_widths_of_floats(d_in: int, hidden: int) -> None:
    compare(make_case(mx.float16, None, d_in=d_in, hidden=hidden), 1, 2, scored=True)


@pytest.mark.parametrize("dtype,held", [(mx.float32, mx.bfloat16), (mx.bfloat16, mx.float32)])
@pytest.mark.parametrize("packing", [FOUR, None])
@compiled
def test_weights_of_another_dtype_than_x(
    packing: ProjectionPacking | None, dtype: mx.Dtype, held: mx.Dtype
) -> None:
    compare(make_case(dtype, packing, d_in=64, hidden=128, held=held, bias=True), 1, 3)


@pytest.mark.parametrize("rows", [1, 3, 37, 65])
@compiled
def test_any_number_of_rows(rows: int) -> None:
    """One kernel at a time, because one's rows are the other's columns."""
    full = make_case(mx.float32, FOUR, d_in=128, hidden=192, bias=True)
    cut = {name: ((rows, *shape[1:]), dtype) for name, (shape, dtype) in full.tensors.items()}
    case = Case(full.spec, cut, full.d_in, full.dtype)
    weights = case.random_weights(8)
    rng = np.random.default_rng(rows)
    x = mx.array(rng.standard_normal((2, 128), np.float32))
    hidden = mx.array(rng.standard_normal((4, 192), np.float32))
    slots = np.array([[7, 0], [7, 3]], np.int32)
    pairs = slots.reshape(-1)
    gate, up, down = (
        dense_weights(name, weights, FOUR)[pairs] for name in ("gate_proj", "up_proj", "down_proj")
    )
    biases = {k: wide(weights[f"{k}.bias"])[pairs] for k in ("gate_proj", "up_proj", "down_proj")}
    token = np.repeat(wide(x), 2, axis=0)[:, :, None]
    expected_hidden = evaluate(
        Activation("sigmoid"),
        (gate @ token)[:, :, 0] + biases["gate_proj"],
        (up @ token)[:, :, 0] + biases["up_proj"],
    )
    expected = (down @ wide(hidden)[:, :, None])[:, :, 0] + biases["down_proj"]
    with harness():
        experts = describe_experts(weights, case.spec)
        assert experts is not None
        routing = metal.RoutedSlots.of(slots)
        found_hidden = metal.expert_gate_up(x, routing, experts)
        found = metal.expert_down(hidden, routing, experts, mx.float32)
    # Together, because a single value may have cancelled to almost nothing.
    for y, exact in ((found_hidden, expected_hidden), (found, expected)):
        assert row_error(wide(y).reshape(1, -1), exact.reshape(1, -1)) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
@compiled
def test_the_reference_agrees(mode: str) -> None:
    """What the kernels replace, in the same dtype, and the native kernel where it was built."""
    packing = ProjectionPacking(4, 32, mode)
    for dtype, tolerance in ((mx.float32, FLOAT32_TOLERANCE), (mx.bfloat16, 4e-2)):
        case = make_case(dtype, packing, d_in=96, hidden=160)
        weights = case.random_weights(N_SLOTS)
        x = mx.random.normal((2, 2, 96), key=mx.random.key(1)).astype(dtype)
        slots = np.array([[[4, 0, 1], [1, 1, 2]], [[3, 3, 3], [0, 4, 2]]], np.int32)
        with harness():
            y = metal.bind_experts(weights, case.spec)(x, slots)
        for twin in (reference, cpu) if native.available() is None else (reference,):
            expected = twin.bind_experts(weights, case.spec)(x, slots)
            assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
            assert row_error(wide(y), wide(expected)) < tolerance


@compiled
def test_a_row_depends_on_itself_and_its_expert_alone() -> None:
    """Not on its company, and not on the slot that its expert is in."""
    case = make_case(mx.bfloat16, FOUR, d_in=64, hidden=128)
    weights = case.random_weights(N_SLOTS)
    x = mx.random.normal((8, 64), key=mx.random.key(2)).astype(mx.bfloat16)
    slots = np.random.default_rng(3).integers(0, N_SLOTS, (8, 3), np.int32)
    order = [3, 0, 4, 1, 2, 0]
    moved = {name: mx.contiguous(array[mx.array(order)]) for name, array in weights.items()}
    place = np.array([order.index(slot) for slot in range(N_SLOTS)], np.int32)
    with harness():
        forward = metal.bind_experts(weights, case.spec)
        together = forward(x, slots)
        assert mx.array_equal(forward(x[2:3], slots[2:3]), together[2:3])
        assert mx.array_equal(forward(x[5:], slots[5:, ::-1]), together[5:, ::-1])
        assert mx.array_equal(metal.bind_experts(moved, case.spec)(x, place[slots]), together)


@compiled
def test_not_a_number_stays_one() -> None:
    case = make_case(mx.float32, FOUR, d_in=64, hidden=64)
    weights = case.random_weights(N_SLOTS)
    x = mx.full((2, 64), 1.0)
    x[1, 3] = float("nan")
    with harness():
        y = metal.bind_experts(weights, case.spec)(x, np.zeros((2, 1), np.int32))
    assert not mx.isnan(y[0]).any()
    assert mx.isnan(y[1]).all()
