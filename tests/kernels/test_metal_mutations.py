"""Broken copies of the Metal kernels are noticed, each made by one change of the real source."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flashmoe.kernels import metal
from flashmoe.kernels.check_cases import GATED, make_case
from flashmoe.kernels.contract import ProjectionPacking
from flashmoe.kernels.metal_experts import ExpertMatrices, Projection, describe_experts
from flashmoe.kernels.metal_launch import MatrixFormat
from flashmoe.kernels.metal_source import METAL_FOLDER
from flashmoe.kernels.self_check import Case, check
from flashmoe.native import Activation
from tests.support.metal_on_cpu import KernelFault, compiled
from tests.support.metals import experts_in_float64, harness, row_error, wide

GATE_UP, DOWN = "expert_gate_up.metal", "expert_down.metal"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
TURN = "turn ^= 1;"
SUM = "sum_over_lanes<Lanes>(sums[r]);"
LAST = "row + r < n_rows)"

# Two chunks of columns for the one kernel or the other, and fewer rows than a threadgroup has.
GROUP_32 = ProjectionPacking(4, 32, "affine")
WIDE = make_case(mx.float32, GROUP_32, d_in=1056, hidden=32, activation=GATED[1], bias=True)
DEEP = make_case(mx.float32, GROUP_32, d_in=32, hidden=1056, bias=True)
STRADDLING = make_case(mx.float32, ProjectionPacking(5, 64, "affine"), d_in=64, hidden=64)
MXFP4 = make_case(mx.float32, ProjectionPacking(4, 32, "mxfp4"), d_in=64, hidden=96)

# What is wrong, where, what stands there, what instead.
WRONG_VALUES = [
    ("scale of another group", "packing.h", "unit * BLOCK / Group", "unit / 2", WIDE),
    ("scale of another row", "packing.h", "row * (cols / Group) +", "cols / Group +", WIDE),
    ("sum of a shifted x", "packing.h", "float(1u << shift_of<CODE_BITS>(i))", "1.0f", WIDE),
    ("codes that straddle words", "packing.h", "words[word + 1] << (32 - shift)", "0", STRADDLING),
    ("e2m1 without its sign", "packing.h", "8u ? -magnitude", "8u ? magnitude", MXFP4),
    ("e8m0 off by one", "packing.h", "scale << 23", "(scale + 1) << 23", MXFP4),
    ("lanes left out of a sum", "rows.h", "offset > 0; offset", "offset > 1; offset", WIDE),
    ("bias of another row", "packing.h", "float(bias[row])", "float(bias[row + 1])", WIDE),
    ("up not shifted", "activation.h", "(u + limits[UP_SHIFT])", "u", WIDE),
    ("gate not limited", "activation.h", "at_most(gate, limits[GATE_MAX])", "gate", WIDE),
    ("another token's x", GATE_UP, "uint64_t(pair / top_k)", "uint64_t(pair % top_k)", WIDE),
    ("the first pair's slot", GATE_UP, "slots[pair]", "slots[0]", WIDE),
    ("off by one row", GATE_UP, "within(row + r,", "within(row + r + 1,", WIDE),
    ("gate and up swapped", GATE_UP, "limits, g, u)", "limits, u, g)", WIDE),
    ("the first pair's slot", DOWN, "slots[pair]", "slots[0]", DEEP),
    ("off by one row", DOWN, "within(row + r,", "within(row + r + 1,", DEEP),
    ("the first chunk again", DOWN, "start / M::VALUES + unit", "unit", DEEP),
    ("another pair's hidden", DOWN, "hidden + uint64_t(pair)", "hidden + (pair ^ 1)", DEEP),
]  # fmt: skip

# The same, and the kind of fault.
FORBIDDEN = [
    ("missing barrier", GATE_UP, BARRIER, "", "unwritten threadgroup memory"),
    ("missing barrier", DOWN, BARRIER, "", "unwritten threadgroup memory"),
    ("one tile for all", GATE_UP, TURN, "", "threadgroup race"),
    ("one tile for all", DOWN, TURN, "", "threadgroup race"),
    ("a barrier for some", GATE_UP, BARRIER, f"if (simdgroup < 2) {BARRIER}", "threadgroup race"),
    ("a sum among some", DOWN, SUM, f"lane < 8 ? {SUM[:-1]} : 0.0f;", "SIMD divergence"),
    ("rows beyond the last", GATE_UP, LAST, "true)", "output race"),
    ("rows beyond the last", DOWN, LAST, "true)", "output race"),
    ("a row less", GATE_UP, LAST, "row + r + 1 < n_rows)", "output not written"),
    ("a row less", DOWN, LAST, "row + r + 1 < n_rows)", "output not written"),
    ("a column more", "rows.h", "BLOCK + lane < width", "BLOCK <= width", "out of bounds"),
]  # fmt: skip


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[str, str, str], Path]:
    """`broken(file, old, new)`: a folder of the Metal sources with that one change."""

    def make(file: str, old: str, new: str) -> Path:
        folder = Path(shutil.copytree(METAL_FOLDER, tmp_path / "metal"))
        text = (folder / file).read_text()
        assert old in text, f"{file} does not contain {old!r}"
        (folder / file).write_text(text.replace(old, new))
        return folder

    return make


def error_of(file: str, case: Case, *, scored: bool = False) -> float:
    """The error of expert_down if that is the file, else of expert_gate_up; two tokens."""
    weights = case.random_weights()
    x = mx.random.normal((2, case.d_in), key=mx.random.key(1))
    slots = np.array([[2, 0], [1, 1]], np.int32)
    expected_hidden, expected = experts_in_float64(case, weights, x, slots)
    experts = describe_experts(weights, case.spec)
    assert experts is not None
    routing = metal.RoutedSlots.of(slots)
    if file != DOWN:
        return row_error(wide(metal.expert_gate_up(x, routing, experts)), expected_hidden)
    hidden = mx.array(expected_hidden.astype(np.float32))
    scores = mx.array([[0.5, 0.2], [0.9, 0.7]])
    y = metal.expert_down(hidden, routing, experts, mx.float32, scores if scored else None)
    if scored:
        expected = np.einsum("tkd,tk->td", expected.reshape(2, 2, -1), wide(scores))
    return row_error(wide(y), expected)


@pytest.mark.parametrize("case", [WIDE, STRADDLING, MXFP4], ids=["wide", "straddling", "mxfp4"])
@compiled
def test_the_sources_as_they_are_pass(case: Case) -> None:
    with harness():
        assert error_of(GATE_UP, case) < 3e-6
        if case is WIDE:
            assert error_of(DOWN, DEEP) < 3e-6
            assert error_of(DOWN, DEEP, scored=True) < 3e-6


@pytest.mark.parametrize(
    "file,old,new,case",
    [entry[1:] for entry in WRONG_VALUES],
    ids=[f"{entry[1]}-{entry[0]}" for entry in WRONG_VALUES],
)
@compiled
def test_wrong_values(
    broken: Callable[[str, str, str], Path], file: str, old: str, new: str, case: Case
) -> None:
    with harness(broken(file, old, new)):
        try:
            assert error_of(file, case) > 1e-3
        except KernelFault as fault:
            # A wrong row or column may also lie behind the last.
            assert fault.kind == "out of bounds"


@pytest.mark.parametrize(
    "old,new",
    [
        ("input + start, score,", "input + start, 1.0f,"),
        ("sums[r] += score * expert", "sums[r] += expert"),
        ("output * n_terms", "output"),
    ],
)
@compiled
def test_wrong_sums(broken: Callable[[str, str, str], Path], old: str, new: str) -> None:
    with harness(broken(DOWN, old, new)):
        assert error_of(DOWN, DEEP, scored=True) > 1e-3


@pytest.mark.parametrize(
    "file,old,new,kind",
    [entry[1:] for entry in FORBIDDEN],
    ids=[f"{entry[1]}-{entry[0]}" for entry in FORBIDDEN],
)
@compiled
def test_forbidden_things(
    broken: Callable[[str, str, str], Path], file: str, old: str, new: str, kind: str
) -> None:
    case = DEEP if file == DOWN else WIDE
    with harness(broken(file, old, new)), pytest.raises(KernelFault) as caught:
        error_of(file, case)
    assert caught.value.kind == kind


@compiled
def test_the_self_check_sees_it_too(broken: Callable[[str, str, str], Path]) -> None:
    with harness(broken("packing.h", "unit * BLOCK / Group", "unit / 2")):
        assert not check(metal.bind_experts, WIDE).passed
    with harness():
        assert check(metal.bind_experts, WIDE).passed


# 2^32 rows before the slot's first, and 2^32 words and scales.
FAR = {"rows": (1 << 30, 64, 4), "words": (64, 8192, 1 << 27)}


@pytest.mark.parametrize("far", FAR)
@compiled
def test_offsets_have_64_bits(far: str) -> None:
    """In 32 bits, a slot so far into the bank is the bank's beginning, which is there. In 64 it
    is not, and the harness says so."""
    with harness(), pytest.raises(KernelFault) as caught:
        read_far_slot(*FAR[far])
    assert caught.value.kind == "out of bounds"


@pytest.mark.parametrize(
    "far,file,old,new",
    [
        ("rows", "packing.h", "in_slot(uint64_t slot", "in_slot(uint slot"),
        ("words", "packing.h", "const uint64_t row = slot", "const uint row = slot"),
    ],
)
@compiled
def test_offsets_of_32_bits_are_seen(
    broken: Callable[[str, str, str], Path], far: str, file: str, old: str, new: str
) -> None:
    with harness(broken(file, old, new)):
        read_far_slot(*FAR[far])


def read_far_slot(n_rows: int, n_cols: int, slot: int) -> None:
    """expert_gate_up over 64 rows of a slot, with a bank of 64 rows said to be of `n_rows` a
    slot."""
    words = mx.zeros((64, n_cols // 8), mx.uint32)
    scales = mx.zeros((64, n_cols // 32), mx.float32)
    part = MatrixFormat("affine", 4, 32, False)
    bank = Projection(part, 64, n_cols, (words, scales, scales, scales))
    experts = ExpertMatrices(None, bank, bank, Activation("sigmoid"))
    routing = metal.RoutedSlots.of(np.array([[slot]], np.int32))
    sizes = mx.array([n_rows, n_cols, 1, 0], mx.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metal, "_sizes", lambda *_: sizes)
        mx.eval(metal.expert_gate_up(mx.ones((1, n_cols)), routing, experts))
