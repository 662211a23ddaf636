"""What `bench kernels` counts, compares and leaves behind."""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import mlx.core as mx
import numpy as np
import pytest

from flashmoe import native
from flashmoe.base.errors import OptionError
from flashmoe.bench import kernels
from flashmoe.bench.expert_cases import ExpertSet
from flashmoe.bench.kernels import KernelBench, KernelResult, bench_kernels
from flashmoe.bench.matmul_cases import (
    Shape,
    Subject,
    WorkingSet,
    copying,
    device_name,
    resolve_packing,
)
from tests.support.commands import Run

SHAPES = (
    Shape("matrix", 256, 64),
    Shape("head", 128, 96, routed=False),
    Shape("expert", 256, 64, experts=True),
)
# 4 bits, and two float32 for each 64 weights.
MATRIX_BYTES = 256 * 64 // 2 + 256 * 64 // 64 * 8
HEAD_BYTES = 128 * 96 // 2 + 128 * 96 // 64 * 8
SLOT_BYTES = {"matrix": MATRIX_BYTES, "head": HEAD_BYTES, "expert": 3 * MATRIX_BYTES}
LEAST_BYTES = 25_000

tiny_bench = functools.partial(bench_kernels, shapes=SHAPES, working_set_bytes=LEAST_BYTES)


def isas_in_use() -> list[str]:
    return [native.isa()] if native.available() is None else []


def working_set(shape: Shape, products_per_call: int) -> WorkingSet | ExpertSet:
    packing = resolve_packing("affine", 4, 64)
    made = ExpertSet if shape.experts else WorkingSet
    return made.random(shape, packing, LEAST_BYTES, products_per_call)


def kernels_of(bench: KernelBench, shape: Shape, rows: int) -> list[str]:
    return [r.kernel for r in bench.results if (r.shape, r.rows) == (shape.name, rows)]


def test_every_matrix_is_measured_beside_mlx() -> None:
    counted = []
    bench = tiny_bench(rounds=3, progress=lambda done, total: counted.append((done, total)))
    assert counted == [(n, 24) for n in range(1, 25)]
    natives = [f"native {isa}" for isa in isas_in_use()]
    for rows in (1, 32):
        assert kernels_of(bench, SHAPES[0], rows) == ["mlx gather_qmm", *natives]
        assert kernels_of(bench, SHAPES[1], rows) == ["mlx quantized_matmul", *natives]
        assert kernels_of(bench, SHAPES[2], rows) == ["mlx experts", *natives]
    assert (bench.bits, bench.group_size, bench.mode) == (4, 64, "affine")
    assert bench.device == device_name()
    assert bench.without_native == native.available()
    assert bench.threads >= 1
    assert bench.copy_bytes_per_second > 0


def test_figures_fit_together() -> None:
    bench = tiny_bench(rounds=3)
    mlx = {(r.shape, r.rows): r for r in bench.results if r.kernel.startswith("mlx")}
    weights = {shape.name: shape.weights for shape in SHAPES}
    for result in bench.results:
        assert 0 < result.slowest <= result.products_per_second <= result.fastest
        # A matrix's bytes are read once for `rows` products per weight.
        bytes_per_product = SLOT_BYTES[result.shape] / (result.rows * weights[result.shape])
        read = result.products_per_second * bytes_per_product
        assert result.bytes_per_second == pytest.approx(read)
        if result.rows == 1 and result.device == "cpu":
            share = result.bytes_per_second / bench.copy_bytes_per_second
            assert result.share_of_copy == pytest.approx(share)
        else:
            assert result.share_of_copy is None
        rival = mlx[result.shape, result.rows]
        if result is rival:
            assert result.times_mlx is None
        else:
            times = result.products_per_second / rival.products_per_second
            assert result.times_mlx == pytest.approx(times)


@pytest.mark.parametrize(
    ("shape", "rows", "limit", "products", "read_bytes"),
    [
        # Three slots hold 25 kB.
        (SHAPES[0], 1, 1 << 29, 3 * 256 * 64, 3 * MATRIX_BYTES),
        (SHAPES[0], 32, 1 << 29, 3 * 32 * 256 * 64, 3 * MATRIX_BYTES),
        (SHAPES[0], 1, 2 * 256 * 64, 2 * 256 * 64, 2 * MATRIX_BYTES),
        (SHAPES[0], 32, 1, 32 * 256 * 64, MATRIX_BYTES),
        (SHAPES[1], 1, 1 << 29, 128 * 96, HEAD_BYTES),
        (SHAPES[1], 32, 1 << 29, 32 * 128 * 96, HEAD_BYTES),
        (SHAPES[2], 1, 1 << 29, 3 * 256 * 64, 3 * MATRIX_BYTES),
        (SHAPES[2], 32, 1 << 29, 32 * 3 * 256 * 64, 3 * MATRIX_BYTES),
        # The most outputs that divide 96 and keep to the limit.
        (SHAPES[1], 32, 32 * 128 * 47, 32 * 128 * 32, HEAD_BYTES // 3),
    ],
)
def test_products_and_bytes(
    shape: Shape, rows: int, limit: int, products: int, read_bytes: int
) -> None:
    weights = working_set(shape, limit)
    assert weights.n_slots == {"matrix": 3, "head": 4, "expert": 1}[shape.name]
    subjects = weights.subjects(rows, isas_in_use())
    assert len(subjects) == 1 + len(isas_in_use())
    for subject in subjects:
        assert (subject.products, subject.bytes_moved) == (products, read_bytes)
        for turn in range(5):
            subject.run(turn)


def test_turns_go_around_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    multiply = mx.gather_qmm

    def spy(*arrays: mx.array, rhs_indices: mx.array, **packing: object) -> mx.array:
        taken.append(rhs_indices.tolist())
        return multiply(*arrays, rhs_indices=rhs_indices, **packing)

    monkeypatch.setattr(mx, "gather_qmm", spy)
    subject, *_ = working_set(SHAPES[0], 2 * 256 * 64).subjects(1, [])
    for turn in range(3):
        subject.run(turn)
    assert taken == [[0, 1], [2, 0], [1, 2]]


def test_a_median_of_interleaved_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    calls = []

    def subject(name: str, seconds: list[float]) -> Subject:
        def run(turn: int) -> None:
            nonlocal clock
            calls.append((name, turn))
            clock += seconds[turn // 2]

        return Subject(name, "cpu", 100, 10, run)

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    subjects = [subject("a", [9.0, 1.0, 4.0, 2.0]), subject("b", [9.0, 1.0, 1.0, 1.0])]
    rounds = []
    timings = kernels._take_turns(subjects, 3, lambda: rounds.append(len(calls)))
    assert [t.seconds for t in timings] == [(1.0, 4.0, 2.0), (1.0, 1.0, 1.0)]
    assert calls == [(name, turn) for turn, name in enumerate("abababab")]
    assert rounds == [2, 4, 6, 8]
    a, b = kernels._summarise(SHAPES[0], 1, timings, 20.0, "cpu")
    assert (a.products_per_second, a.slowest, a.fastest) == (50.0, 25.0, 100.0)
    assert (a.bytes_per_second, a.share_of_copy, a.times_mlx) == (5.0, 0.25, None)
    assert (b.products_per_second, b.times_mlx) == (100.0, 2.0)


def test_copies_count_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    copyto = np.copyto

    def spy(target: np.ndarray, source: np.ndarray) -> None:
        copyto(target, source)
        copied.append(target.nbytes + source.nbytes)
        assert target.all()

    monkeypatch.setattr(np, "copyto", spy)
    with ThreadPoolExecutor(3) as pool:
        subject = copying(1001, pool, 3)
        subject.run(0)
    assert subject.bytes_moved == sum(copied) == 1000
    assert len(copied) == 3


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_other_modes(mode: str) -> None:
    bench = tiny_bench(rounds=1, mode=mode)
    bits, group_size = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}[mode]
    assert (bench.bits, bench.group_size, bench.mode) == (bits, group_size, mode)
    if mode == "mxfp4":
        assert bench.without_native == native.available()
    else:
        assert bench.without_native is not None
        assert all(r.kernel.startswith("mlx ") for r in bench.results)


def test_instruction_sets_are_taken_in_turn_and_given_back() -> None:
    if native.available() is not None:
        with pytest.raises(OptionError, match="was not built"):
            tiny_bench(isas=["portable"])
        return
    before = native.isa()
    bench = tiny_bench(rounds=1, isas=["portable", before, "portable"])
    names = dict.fromkeys(["portable", before])
    assert kernels_of(bench, SHAPES[0], 1)[1:] == [f"native {name}" for name in names]
    assert native.isa() == before
    with pytest.raises(OptionError, match="sse9"):
        tiny_bench(isas=["portable", "sse9"])
    assert native.isa() == before


def test_an_instruction_set_for_what_is_not_covered() -> None:
    with pytest.raises(OptionError, match="portable cannot be measured"):
        tiny_bench(isas=["portable"], mode="nvfp4")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("isa", "use_isa", "threads", "matrix", "matmul", "experts"):
        monkeypatch.delattr(native, name)
    monkeypatch.setattr(native, "available", lambda: "it was not built")
    bench = tiny_bench(rounds=1)
    assert bench.without_native == "it was not built"
    assert [r.kernel.split()[0] for r in bench.results] == ["mlx"] * 6


def test_on_a_gpu_shares_are_of_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matmul_cases", "expert_cases"):
        monkeypatch.setattr(f"flashmoe.bench.{module}.device_name", lambda: "gpu")
    bench = tiny_bench(rounds=1)
    for result in bench.results:
        on_gpu = result.kernel.startswith("mlx ")
        assert result.device == ("gpu" if on_gpu else "cpu")
        assert (result.share_of_copy is None) == (not on_gpu or result.rows > 1)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "bench_kernels", tiny_bench)


def test_json(run_cli: Run, brief: None) -> None:
    line = run_cli("bench", "kernels", "--rounds", "2", "--bits", "8", "--json").json()
    assert list(line) == [field.name for field in fields(KernelBench)]
    assert (line["bits"], line["group_size"], line["mode"]) == (8, 64, "affine")
    assert len(line["results"]) == 6 * (1 + len(isas_in_use()))
    for result in line["results"]:
        assert list(result) == [field.name for field in fields(KernelResult)]


def test_table(run_cli: Run, brief: None) -> None:
    result = run_cli("bench", "kernels", "--rounds", "1", "--mode", "mxfp4")
    assert (result.code, result.err) == (0, "")
    first, *lines = result.out.splitlines()
    assert first.startswith(f"4-bit mxfp4, groups of 32; MLX on the {device_name()}; ")
    assert ("no native kernel: " in result.out) == (native.available() is not None)
    rows = [line for line in lines if line.startswith("│ expert")]
    assert len(rows) == 2 * (1 + len(isas_in_use()))
    assert "256 x 64" in rows[0]


def test_table_says_why_there_is_no_native_kernel(run_cli: Run, brief: None) -> None:
    result = run_cli("bench", "kernels", "--rounds", "1", "--mode", "nvfp4")
    assert result.code == 0
    assert "\nno native kernel: " in result.out
    assert "native avx" not in result.out
