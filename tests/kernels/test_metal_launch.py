"""Shapes, formats and sources of the Metal kernels, and what they move: no kernel runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwiGLU

from flashmoe.base.errors import OptionError
from flashmoe.kernels import metal, metal_launch, reference
from flashmoe.kernels.check_cases import make_case
from flashmoe.kernels.contract import ExpertSpec, ProjectionPacking
from flashmoe.kernels.metal_experts import address, describe_experts
from flashmoe.kernels.metal_launch import (
    MatrixFormat,
    down_launch,
    gate_up_launch,
    lanes_per_row,
)
from flashmoe.kernels.metal_source import (
    EXPERT_DOWN,
    EXPERT_GATE_UP,
    KERNELS,
    METAL_FOLDER,
    KernelSource,
    build,
    resolve_includes,
    sources_digest,
)
from flashmoe.kernels.roofline import down_traffic, gate_up_traffic
from flashmoe.kernels.select import kernel_statuses, select_kernel

FOUR = MatrixFormat("affine", 4, 64, False)
PACKED = ProjectionPacking(4, 64, "affine")
SWIGLU = SwiGLU()


def constants(header: str) -> dict[str, int]:
    """The whole numbers that a header of metal/ names."""
    text = (METAL_FOLDER / header).read_text()
    return {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", text)}


def test_both_sides_name_the_same_numbers() -> None:
    packing, rows, activation = map(constants, ("packing.h", "rows.h", "activation.h"))
    assert {kind.upper(): number for kind, number in metal_launch.FORMATS.items()} == {
        name: packing[name] for name in ("AFFINE", "MXFP4", "FLOAT32", "FLOAT16", "BFLOAT16")
    }
    assert packing["BLOCK"] == metal_launch.BLOCK
    assert (rows["SIMDGROUPS"], rows["ROWS"]) == (metal_launch.SIMDGROUPS, metal_launch.ROWS)
    assert [rows[name] for name in ("N_ROWS", "N_COLS", "TOP_K", "ACTIVATION")] == [0, 1, 2, 3]
    kinds = {kind.upper(): number for kind, number in metal_launch.ACTIVATIONS.items()}
    assert kinds == {name: activation[name] for name in kinds}
    names = ("ALPHA", "GATE_MAX", "ACTIVATED_MAX", "UP_MAX", "UP_BOUND", "UP_SHIFT")
    assert [activation[name] for name in names] == list(range(6))


def test_launches() -> None:
    launch = gate_up_launch(FOUR, 1024, 4096, n_tokens=3, top_k=10, gated=True)
    assert launch.kernel is EXPERT_GATE_UP
    # 16 rows for each of 64 threadgroups.
    assert (launch.grid, launch.threadgroup) == ((64 * 128, 30, 1), (128, 1, 1))
    assert dict(launch.template) == {
        "GATED": True, "LANES": 32, "FORMAT": 0, "BITS": 4, "GROUP": 64, "HAS_BIAS": False
    }  # fmt: skip
    assert launch.output_shape == (30, 1024)
    launch = down_launch(FOUR, 4097, 512, n_tokens=3, top_k=10, scored=False)
    assert launch.kernel is EXPERT_DOWN
    # 16 lanes for a row, so 32 rows for each threadgroup, and one for the last row.
    assert launch.grid == (129 * 128, 30, 1)
    assert launch.output_shape == (30, 4097)
    launch = down_launch(FOUR, 4096, 512, n_tokens=3, top_k=10, scored=True)
    assert (launch.grid[1], launch.output_shape) == (3, (3, 4096))


@pytest.mark.parametrize(
    "cols,lanes", [(32, 8), (256, 8), (512, 16), (768, 8), (1024, 32), (2880, 32), (4096, 32)]
)
def test_lanes(cols: int, lanes: int) -> None:
    assert lanes_per_row(cols, 32) == lanes


def test_alignment() -> None:
    """The widest load that a lane's part of a row is made of."""
    widths = {
        bits: MatrixFormat("affine", bits, 64, False).alignment for bits in (2, 3, 4, 5, 6, 8)
    }
    assert widths == {2: 8, 3: 4, 4: 16, 5: 4, 6: 8, 8: 16}
    assert MatrixFormat("mxfp4", 4, 32, False).alignment == 16
    assert [
        MatrixFormat(k, b, 0, False).alignment for k, b in (("float16", 16), ("float32", 32))
    ] == [
        16,
        16,
    ]


def test_traffic_of_qwen() -> None:
    """The numbers of `metal`'s docstring; a record of this model has 7,077,888 bytes."""
    gate_up = gate_up_traffic(FOUR, 1024, 4096, n_tokens=1, top_k=10)
    down = down_traffic(FOUR, 4096, 1024, n_tokens=1, top_k=10)
    assert gate_up.weight_bytes + down.weight_bytes == 10 * 7_077_888
    assert gate_up.total_bytes == 47_185_920 + 2 * 4096 + 10 * 4 * 1024
    assert down.total_bytes == 23_592_960 + 10 * 4 * 1024 + 2 * 4096 + 40
    assert (gate_up.operations, down.operations) == (167_772_160, 83_886_080)
    token_bytes = 60 * (gate_up.total_bytes + down.total_bytes)
    assert round(token_bytes / 1e9, 2) == 4.25
    assert round(400e9 / token_bytes) == 94
    assert gate_up.seconds(gate_up.total_bytes) == 1.0
    assert round(gate_up.operations / gate_up.total_bytes, 1) == 3.6


def test_traffic_of_other_formats() -> None:
    mxfp4 = MatrixFormat("mxfp4", 4, 32, True)
    traffic = gate_up_traffic(mxfp4, 2880, 2880, n_tokens=2, top_k=4)
    assert traffic.weight_bytes == 8 * 2 * 2880 * (2880 // 2 + 2880 // 32 + 2)
    plain = gate_up_traffic(
        MatrixFormat("float16", 16, 0, False), 40, 72, n_tokens=1, top_k=2, gated=False
    )
    assert plain.weight_bytes == 2 * 40 * 72 * 2
    unscored = down_traffic(FOUR, 64, 128, n_tokens=1, top_k=2, scored=False)
    assert unscored.activation_bytes == 2 * 128 * 4 + 2 * 64 * 2


def test_includes(tmp_path: Path) -> None:
    (tmp_path / "a.h").write_text('#pragma once\n#include "b.h"\nint a;\n')
    (tmp_path / "b.h").write_text("#pragma once\n#include <system>\nint b;\n")
    (tmp_path / "k.metal").write_text('#include "a.h"\n#include "b.h"\nint k;\n')
    assert resolve_includes(tmp_path / "k.metal") == "#include <system>\nint b;\nint a;\nint k;\n"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_sources(kernel: KernelSource) -> None:
    """Every function is in a file; what MLX gets as the body declares tiles and calls one."""
    header = kernel.header()
    assert '#include "' not in header
    assert "#pragma once" not in header
    assert f"METAL_FUNC void {kernel.name}(" in header
    assert kernel.body.count(";") == 2
    assert kernel.body.count(f"flashmoe::{kernel.name}<") == 1
    # MLX adds parameters for names like these.
    assert not re.search(r"_(shape|strides|ndim)\b", kernel.body)


def test_the_digest_is_that_of_the_sources() -> None:
    assert re.fullmatch("[0-9a-f]{12}", sources_digest())


def test_building_needs_no_gpu() -> None:
    for kernel in KERNELS:
        assert build(kernel) is build(kernel)
    if mx.metal.is_available():
        return
    case = make_case(mx.float32, PACKED, d_in=64, hidden=64)
    weights = case.random_weights()
    experts = describe_experts(weights, case.spec)
    if experts is not None:
        routing = metal.RoutedSlots.of(np.zeros((1, 1), np.int32))
        with pytest.raises(RuntimeError, match="No Metal"):
            metal.expert_gate_up(mx.ones((1, 64)), routing, experts)


def bank(**changes: mx.array | None) -> dict[str, mx.array]:
    """Experts that are covered, but for the arrays that change."""
    case = make_case(mx.float32, PACKED, d_in=64, hidden=64)
    weights = {**case.random_weights(), **{k.replace("__", "."): v for k, v in changes.items()}}
    return {name: array for name, array in weights.items() if array is not None}


def is_covered(
    weights: dict[str, mx.array],
    packing: dict[str, ProjectionPacking] | None = None,
    activation: Callable[..., mx.array] = SWIGLU,
) -> bool:
    names = ("gate_proj", "up_proj", "down_proj")
    packing = dict.fromkeys(names, PACKED) | (packing or {})
    spec = ExpertSpec("SwitchGLU", activation, packing)
    return metal.covers_experts(weights, spec)


@pytest.fixture
def aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's allocator for CPUs aligns to 8 bytes, the one for Metal to pages."""
    monkeypatch.setattr("flashmoe.kernels.metal_experts.address", lambda array: 0)


@pytest.mark.usefixtures("aligned")
def test_what_is_covered() -> None:
    assert is_covered(bank())
    assert not is_covered(bank(), activation=lambda up, gate: mx.sin(gate) * up)
    assert not is_covered(bank(), {"down_proj": ProjectionPacking(4, 16, "nvfp4")})
    assert not is_covered(bank(), {"down_proj": ProjectionPacking(8, 32, "mxfp8")})
    assert not is_covered(bank(down_proj__global_scale=mx.ones((3,))))
    # Gate and up share their template arguments.
    narrow = mx.zeros((3, 64, 1), mx.float16)
    assert not is_covered(bank(gate_proj__scales=narrow))
    assert not is_covered(bank(gate_proj__bias=mx.zeros((3, 64))))
    assert is_covered(bank(down_proj__scales=narrow, down_proj__biases=narrow))
    # Arrays of less than 8 elements lie in another address space.
    assert not is_covered({name: array[:1, :4] for name, array in bank().items()})
    turned = mx.swapaxes(mx.zeros((3, 8, 64), mx.uint32), 1, 2)
    assert not is_covered(bank(down_proj__weight=turned))


@pytest.mark.usefixtures("aligned")
def test_floats_are_covered_in_units() -> None:
    for width, covered in ((72, True), (68, False)):
        case = make_case(mx.bfloat16, None, d_in=width, hidden=width)
        assert metal.covers_experts(case.random_weights(), case.spec) == covered


def test_weights_have_to_be_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    for place, covered in ((16, True), (8, False)):
        monkeypatch.setattr("flashmoe.kernels.metal_experts.address", lambda array, at=place: at)
        assert is_covered(bank()) == covered
    array = mx.arange(64)
    mx.eval(array)
    assert address(array[2:]) in (0, address(array) + 8)


@pytest.mark.usefixtures("aligned")
def test_who_gets_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows the kernels, many the products per expert, other dtypes the reference."""
    case = make_case(mx.float32, PACKED, d_in=64, hidden=64)
    weights = case.random_weights()
    monkeypatch.setattr(metal, "expert_gate_up", lambda *_: "hidden")
    monkeypatch.setattr(metal, "expert_down", lambda *_: mx.zeros((8, 64)))
    forward = metal.bind_experts(weights, case.spec)
    few = np.zeros((2, 4, 1), np.int32)
    assert mx.array_equal(forward(mx.ones((2, 4, 64)), few), mx.zeros((2, 4, 1, 64)))
    many = np.array([[0], [2], [1]] * 3, np.int32)
    x = mx.random.normal((9, 64), key=mx.random.key(0))
    expected = reference.bind_experts(weights, case.spec)(x, many)
    assert mx.allclose(forward(x, many), expected, rtol=1e-5, atol=1e-6)
    assert forward(x[:0], many[:0]).shape == (0, 1, 64)


def test_selection() -> None:
    status = {status.name: status for status in kernel_statuses()}["metal"]
    missing = metal.available()
    assert status.available == (missing is None)
    if missing is not None:
        assert status.note == missing
        with pytest.raises(OptionError, match=f"kernel metal is not there: {missing}"):
            select_kernel("metal")


def test_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Mac, unless its GPU is not to be used."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert metal.available() is None
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    assert metal.available() == "MLX was told to compute on the CPU"
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert metal.available() == "MLX has no Metal on this machine"
