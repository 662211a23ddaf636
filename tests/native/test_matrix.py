"""The native CPU library against float64, the reference kernel, itself, and sanitizers."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe import native
from flashmoe.base.errors import OptionError
from flashmoe.native import build, loader
from tests.support.natives import QUIET_SANITIZERS, compiled, isas_here

DTYPES = {"f32": mx.float32, "bf16": mx.bfloat16, "f16": mx.float16}
AFFINE = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
N_SLOTS = 5
CHECKS = ("native_check.cpp", "attention_check.cpp", "checksum_check.cpp", "fit_check.cpp")
# Of the row norm: a row is one pair's outputs.
TOLERANCE = 2e-6

Floats = npt.NDArray[np.float32]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Every test leaves the library as it was."""
    if native.available() is not None:
        yield
        return
    isa = native.isa()
    yield
    native.use_isa(isa)
    native.set_threads(0)


@dataclass(frozen=True)
class Weights:
    """Matrices [N_SLOTS, rows, cols], their values as the arithmetic defines them, and MLX's own
    product in float32, which takes x [n, 1, cols] and slots [n]."""

    matrix: native.Matrix
    values: Floats
    twin: Callable[[mx.array, mx.array], mx.array]


def quantized(rows: int, cols: int, bits: int, group: int, mode: str, dtype: mx.Dtype) -> Weights:
    """Random quantized weights."""
    weight = mx.random.normal((N_SLOTS, rows, cols), key=mx.random.key(rows * cols + bits))
    packed, *rest = mx.quantize(weight, group_size=group, bits=bits, mode=mode)
    if mode == "affine":
        rest = [array.astype(dtype) for array in rest]
    mx.eval(packed, *rest)
    wide = [array.astype(mx.float32) for array in rest] if mode == "affine" else rest
    values = mx.dequantize(packed, *wide, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
    matrix = native.matrix(packed, *rest, bits=bits, group_size=group, mode=mode)

    def twin(x: mx.array, slots: mx.array) -> mx.array:
        return mx.gather_qmm(
            x, packed, *wide, rhs_indices=slots, group_size=group, bits=bits, mode=mode
        )

    return Weights(matrix, np.array(values), twin)


def floating(rows: int, cols: int, dtype: mx.Dtype) -> Weights:
    """Random weights that are not quantized."""
    weight = mx.random.normal((N_SLOTS, rows, cols), key=mx.random.key(cols)).astype(dtype)
    wide = weight.astype(mx.float32)
    mx.eval(weight, wide)

    def twin(x: mx.array, slots: mx.array) -> mx.array:
        return mx.gather_mm(x, wide.swapaxes(-1, -2), rhs_indices=slots)

    return Weights(native.matrix(weight), np.array(wide), twin)


def routed(cols: int, pairs: int, seed: int) -> tuple[Floats, Any, Any]:
    """Rows of x, and pairs with repeated and permuted slots and rows: slot 3 has most of them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((max(1, pairs // 2), cols), np.float32)
    slots = np.where(rng.random(pairs) < 0.6, 3, rng.integers(0, N_SLOTS, pairs))
    return x, slots.astype(np.int32), rng.integers(0, len(x), pairs).astype(np.int32)


def check(weights: Weights, pairs: int) -> None:
    """On every instruction set here, against float64 and against MLX."""
    matrix = weights.matrix
    x, slots, x_rows = routed(matrix.cols, pairs, seed=pairs)
    twin = np.array(weights.twin(mx.array(x[x_rows])[:, None], mx.array(slots)))[:, 0]
    wide = weights.values.astype(np.float64)
    expected = np.stack([wide[s] @ x[r] for s, r in zip(slots, x_rows, strict=True)])
    # One output alone may cancel to nothing: its scale is that of the products it sums.
    norms = np.linalg.norm(expected, axis=1)
    if matrix.rows < 8:
        norms = np.linalg.norm(x[x_rows], axis=1) * np.linalg.norm(wide[slots], axis=(1, 2))
    for isa in isas_here():
        native.use_isa(isa)
        y = native.matmul(x, matrix, slots, x_rows)
        errors = np.linalg.norm(y - expected, axis=1) / norms
        assert errors.max() < TOLERANCE, isa
        # Over thousands of columns it is MLX that is further than that from float64.
        errors = np.linalg.norm(y - twin, axis=1) / norms
        assert errors.max() < TOLERANCE * max(1, matrix.cols / 1024), isa


SHAPES = [(64, 128, 1), (33, 1024, 3), (7, 1024, 4), (1, 256, 70), (12, 4096, 9), (21, 384, 70)]


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits,group", AFFINE)
def test_affine(bits: int, group: int, dtype: str) -> None:
    for rows, cols, pairs in [*SHAPES, (16, group, 2), (9, 1056 // group * group, 70)]:
        check(quantized(rows, cols, bits, group, "affine", DTYPES[dtype]), pairs)


@compiled
def test_mxfp4() -> None:
    for rows, cols, pairs in [*SHAPES, (16, 32, 2), (9, 1056, 70)]:
        check(quantized(rows, cols, 4, 32, "mxfp4", mx.float32), pairs)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 3, 15, 16, 17, 33, 100, 1056, 2047, 2049, 4099])
def test_floats(cols: int, dtype: str) -> None:
    for rows, pairs in [(1, 1), (3, 4), (8, 1), (13, 70), (37, 6)]:
        check(floating(rows, cols, DTYPES[dtype]), pairs)


@compiled
@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    rows, pairs = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    bits, group = data.draw(st.sampled_from([(0, 0), *AFFINE]))
    if bits == 0:
        check(floating(rows, data.draw(st.integers(1, 1100)), dtype), pairs)
        return
    cols = group * data.draw(st.integers(1, 1100 // group))
    check(quantized(rows, cols, bits, group, "affine", dtype), pairs)


@compiled
def test_every_code_and_scale_of_mxfp4() -> None:
    words = np.array([0x76543210, 0xFEDCBA98, 0, 0], np.uint32)
    weight = mx.array(np.broadcast_to(words, (1, 253, 4)).copy())
    scales = mx.array(np.arange(253, dtype=np.uint8).reshape(1, 253, 1))
    mx.eval(weight, scales)
    matrix = native.matrix(weight, scales, bits=4, group_size=32, mode="mxfp4")
    codes = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    # Each row of x picks one column.
    expected = np.outer(codes, 2.0 ** (np.arange(253) - 127.0)).astype(np.float32)
    for isa in isas_here():
        native.use_isa(isa)
        y = native.matmul(np.eye(16, 32, dtype=np.float32), matrix, np.zeros(16, np.int32))
        assert np.array_equal(y, expected), isa


@compiled
@pytest.mark.parametrize("kind", ["affine4", "affine5", "mxfp4", "bf16"])
def test_a_pair_depends_on_its_row_and_slot_alone(kind: str) -> None:
    rows, cols = 45, 2176
    if kind == "bf16":
        matrix = floating(rows, cols, mx.bfloat16).matrix
    else:
        mode = kind.rstrip("45") if kind != "mxfp4" else kind
        group = 32 if kind == "mxfp4" else 64
        matrix = quantized(rows, cols, int(kind[-1]), group, mode, mx.bfloat16).matrix
    x, slots, x_rows = routed(cols, 130, seed=1)
    for isa in isas_here():
        native.use_isa(isa)
        native.set_threads(1)
        together = native.matmul(x, matrix, slots, x_rows)
        for threads in (2, 3, 7):
            native.set_threads(threads)
            assert np.array_equal(native.matmul(x, matrix, slots, x_rows), together)
        for count in (1, 2, 5, 33):
            chosen = np.random.default_rng(count).permutation(len(slots))[:count]
            some = native.matmul(x, matrix, slots[chosen], x_rows[chosen])
            assert np.array_equal(some, together[chosen]), (isa, count)


@compiled
def test_a_slot_is_read_when_a_product_runs() -> None:
    weight = mx.zeros((2, 8, 32))
    mx.eval(weight)
    matrix = native.matrix(weight)
    memoryview(weight).cast("B").cast("f")[8 * 32 + 5] = 3.0  # type: ignore[arg-type]
    y = native.matmul(np.ones((1, 32), np.float32), matrix, np.array([1], np.int32))
    assert y.tolist() == [[3.0] + [0.0] * 7]


@compiled
def test_defaults_and_out() -> None:
    weights = quantized(16, 64, 4, 64, "affine", mx.float32)
    matrix, values = weights.matrix, weights.values
    x = np.random.default_rng(0).standard_normal((4, 64), np.float32)
    out = np.full((4, 16), np.nan, np.float32)
    assert native.matmul(x, matrix, out=out) is out
    assert np.allclose(out, x @ values[0].T, atol=1e-5)
    assert native.matmul(x[:0], matrix).shape == (0, 16)


@compiled
def test_arguments_that_do_not_fit() -> None:
    matrix = quantized(16, 64, 4, 64, "affine", mx.float32).matrix
    x = np.zeros((2, 64), np.float32)
    with pytest.raises(OptionError, match=r"x must be \[n, 64\]"):
        native.matmul(np.zeros((2, 32), np.float32), matrix)
    with pytest.raises(OptionError, match=r"slots must lie in 0 .. 4"):
        native.matmul(x, matrix, np.array([0, 5], np.int32))
    with pytest.raises(OptionError, match=r"x_rows must lie in 0 .. 1"):
        native.matmul(x, matrix, x_rows=np.array([-1], np.int32))
    with pytest.raises(OptionError, match="3 pairs need as many rows"):
        native.matmul(x, matrix, np.zeros(3, np.int32))
    with pytest.raises(OptionError, match="row-contiguous float32"):
        native.matmul(x, matrix, out=np.zeros((2, 16)))
    with pytest.raises(OptionError, match="does not run 'sse9'"):
        native.use_isa("sse9")


@compiled
@pytest.mark.parametrize(
    "changes,code",
    [
        ({}, loader.OK),
        ({"bits": 7}, loader.UNSUPPORTED),
        ({"bits": 1}, loader.UNSUPPORTED),
        ({"bits": 9}, loader.UNSUPPORTED),
        ({"group_size": 16}, loader.UNSUPPORTED),
        ({"group_size": 0}, loader.UNSUPPORTED),
        ({"scale_dtype": 3}, loader.UNSUPPORTED),
        ({"format": 5}, loader.UNSUPPORTED),
        ({"format": loader.MXFP4}, loader.UNSUPPORTED),
        ({"cols": 96}, loader.BAD_ARGUMENT),
        ({"cols": -64}, loader.BAD_ARGUMENT),
        ({"weight": None}, loader.BAD_ARGUMENT),
        ({"scales": None}, loader.BAD_ARGUMENT),
        ({"biases": None}, loader.BAD_ARGUMENT),
    ],
)
def test_error_codes(changes: dict[str, Any], code: int) -> None:
    matrix = quantized(16, 64, 4, 64, "affine", mx.float32).matrix
    described = loader.FmMatrix.from_buffer_copy(matrix.description)
    for field, value in changes.items():
        setattr(described, field, value)
    x, y = np.zeros((1, 64), np.float32), np.zeros((1, 16), np.float32)
    arguments = (x.ctypes.data, None, None, 1, ctypes.byref(described), y.ctypes.data)
    assert loader.loaded().fm_matmul(*arguments) == code


@compiled
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12's, about forking threads
def test_a_child_process_has_threads_of_its_own() -> None:
    matrix = quantized(512, 512, 4, 64, "affine", mx.float32).matrix
    x = np.ones((1, 512), np.float32)
    native.set_threads(3)
    expected = native.matmul(x, matrix)
    child = os.fork()
    if child == 0:
        same = np.array_equal(native.matmul(x, matrix), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


@compiled
def test_threads() -> None:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert native.threads() == usable
    native.set_threads(5)
    assert native.threads() == 5


@compiled
def test_threads_sleep_when_nothing_runs() -> None:
    matrix = quantized(512, 1024, 4, 64, "affine", mx.float32).matrix
    native.set_threads(3)
    native.matmul(np.ones((1, 1024), np.float32), matrix)
    time.sleep(0.01)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


# --- building -----------------------------------------------------------------------------------


def test_the_library_that_is_built_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    assert loader.LIBRARY == build.LIBRARY
    if build.find_compiler() is None:
        assert "C++ compiler" in str(native.available())
        return
    build.build_library(tmp_path / build.LIBRARY, flags=["-O0"])
    version = ctypes.CDLL(str(tmp_path / build.LIBRARY)).fm_version
    version.restype = ctypes.c_char_p
    assert version().decode() == loader.VERSION


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    with pytest.raises(build.CompilationError, match=r"no C\+\+ compiler"):
        build.build_library(tmp_path / "library.so")
    with pytest.raises(build.CompilationError, match="cannot be run"):
        build.build_library(tmp_path / "library.so", compiler=[str(tmp_path / "c++")])
    assert list(tmp_path.iterdir()) == []


def test_every_source_belongs_to_a_machine() -> None:
    folder = Path(build.__file__).parent
    named = {name for machine in ("x86_64", "arm64", "riscv64") for name in build.sources(machine)}
    assert named == {path.name for path in folder.glob("*.cpp")}


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    if build.find_compiler() is None:
        assert native.available() is not None
        return
    program = tmp_path / "native_check"
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    checks = [Path(__file__).with_name(name) for name in CHECKS]
    build.build_library(program, flags=flags, extra=checks, shared=False)
    done = subprocess.run(
        [program], capture_output=True, text=True, check=False, env=QUIET_SANITIZERS
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "portable" in done.stdout
