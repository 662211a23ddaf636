"""The native CPU library against float64, the reference kernel, itself, and sanitizers."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from families import FAMILIES, build_model
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import quantize_model

from flashmoe import native
from flashmoe.errors import OptionError
from flashmoe.kernels import cpu, reference
from flashmoe.kernels.contract import ExpertSpec, ProjectionPacking
from flashmoe.kernels.select import kernel_names, select_kernel
from flashmoe.native import build, loader

ISAS = ("avx512", "avx2", "neon", "portable")
DTYPES = {"f32": mx.float32, "bf16": mx.bfloat16, "f16": mx.float16}
AFFINE = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
N_SLOTS = 5
# Of the row norm: a row is one pair's outputs.
TOLERANCE = 2e-6

Floats = npt.NDArray[np.float32]


def compiled(test: Callable[..., None]) -> Callable[..., None]:
    """The test where there is a library; elsewhere, that the library says why it is not there."""

    @functools.wraps(test)
    def without(*args: Any, **kwargs: Any) -> None:
        assert "was not built" in str(native.available())

    return test if native.available() is None else without


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


def isas_here() -> list[str]:
    found = []
    for name in ISAS:
        try:
            native.use_isa(name)
        except OptionError:
            continue
        found.append(name)
    return found


def quantized(
    rows: int, cols: int, bits: int, group: int, mode: str, dtype: mx.Dtype
) -> tuple[native.Matrix, Floats]:
    """Random weights [N_SLOTS, rows, cols] and their values as the arithmetic defines them."""
    weight = mx.random.normal((N_SLOTS, rows, cols), key=mx.random.key(rows * cols + bits))
    packed, *rest = mx.quantize(weight, group_size=group, bits=bits, mode=mode)
    if mode == "affine":
        rest = [array.astype(dtype) for array in rest]
    mx.eval(packed, *rest)
    wide = [array.astype(mx.float32) for array in rest] if mode == "affine" else rest
    values = mx.dequantize(packed, *wide, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
    return (
        native.matrix(packed, *rest, bits=bits, group_size=group, mode=mode),
        np.array(values),
    )


def routed(cols: int, pairs: int, seed: int) -> tuple[Floats, Any, Any]:
    """Rows of x, and pairs with repeated and permuted slots and rows: slot 3 has most of them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((max(1, pairs // 2), cols), np.float32)
    slots = np.where(rng.random(pairs) < 0.6, 3, rng.integers(0, N_SLOTS, pairs))
    return x, slots.astype(np.int32), rng.integers(0, len(x), pairs).astype(np.int32)


def check(matrix: native.Matrix, values: Floats, pairs: int) -> None:
    x, slots, x_rows = routed(matrix.cols, pairs, seed=pairs)
    wide = values.astype(np.float64)
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


SHAPES = [(64, 128, 1), (33, 1024, 3), (7, 1024, 4), (1, 256, 70), (12, 4096, 9), (21, 384, 70)]


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits,group", AFFINE)
def test_affine(bits: int, group: int, dtype: str) -> None:
    for rows, cols, pairs in [*SHAPES, (16, group, 2), (9, 1056 // group * group, 70)]:
        check(*quantized(rows, cols, bits, group, "affine", DTYPES[dtype]), pairs)


@compiled
def test_mxfp4() -> None:
    for rows, cols, pairs in [*SHAPES, (16, 32, 2), (9, 1056, 70)]:
        check(*quantized(rows, cols, 4, 32, "mxfp4", mx.float32), pairs)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 3, 15, 16, 17, 33, 100, 1056, 2047, 2049, 4099])
def test_floats(cols: int, dtype: str) -> None:
    for rows, pairs in [(1, 1), (3, 4), (8, 1), (13, 70), (37, 6)]:
        weight = mx.random.normal((N_SLOTS, rows, cols), key=mx.random.key(cols))
        weight = weight.astype(DTYPES[dtype])
        mx.eval(weight)
        check(native.matrix(weight), np.array(weight.astype(mx.float32)), pairs)


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
        weight = mx.random.normal((N_SLOTS, rows, cols)).astype(mx.bfloat16)
        mx.eval(weight)
        matrix = native.matrix(weight)
    else:
        mode = kind.rstrip("45") if kind != "mxfp4" else kind
        group = 32 if kind == "mxfp4" else 64
        matrix, _ = quantized(rows, cols, int(kind[-1]), group, mode, mx.bfloat16)
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
    matrix, values = quantized(16, 64, 4, 64, "affine", mx.float32)
    x = np.random.default_rng(0).standard_normal((4, 64), np.float32)
    out = np.full((4, 16), np.nan, np.float32)
    assert native.matmul(x, matrix, out=out) is out
    assert np.allclose(out, x @ values[0].T, atol=1e-5)
    assert native.matmul(x[:0], matrix).shape == (0, 16)


@compiled
def test_arguments_that_do_not_fit() -> None:
    matrix, _ = quantized(16, 64, 4, 64, "affine", mx.float32)
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
    matrix, _ = quantized(16, 64, 4, 64, "affine", mx.float32)
    described = loader.FmMatrix.from_buffer_copy(matrix.description)
    for field, value in changes.items():
        setattr(described, field, value)
    x, y = np.zeros((1, 64), np.float32), np.zeros((1, 16), np.float32)
    arguments = (x.ctypes.data, None, None, 1, ctypes.byref(described), y.ctypes.data)
    assert loader.loaded().fm_matmul(*arguments) == code


@compiled
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12's, about forking threads
def test_a_child_process_has_threads_of_its_own() -> None:
    matrix, _ = quantized(512, 512, 4, 64, "affine", mx.float32)
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


# --- experts ------------------------------------------------------------------------------------

EXPERTS = [
    ("qwen3_moe", 4, 64, "affine"),
    ("qwen3_moe", 3, 32, "affine"),
    ("qwen3_moe", None, 0, ""),
    ("gpt_oss", 4, 32, "mxfp4"),
    ("gpt_oss", 4, 64, "affine"),
    ("nemotron_h", 4, 64, "affine"),
    ("nemotron_h", None, 0, ""),
]


def experts_of(
    family: str, bits: int | None, group: int, mode: str
) -> tuple[dict[str, mx.array], ExpertSpec]:
    """The weights and spec of a family's first layer of routed experts."""
    config = FAMILIES[family]
    model = build_model(config, seed=3)
    if bits is not None:
        model, _ = quantize_model(model, dict(config), group, bits, mode=mode)
    module = next(m for _, m in model.named_modules() if isinstance(m, SwitchGLU | SwitchMLP))
    weights, packing = {}, {}
    for name, projection in module.children().items():
        for tensor, array in projection.parameters().items():
            # gpt_oss initialises the biases to almost nothing.
            weights[f"{name}.{tensor}"] = array + 0.5 if tensor == "bias" else array
        if bits is not None and "weight" in projection:
            packing[name] = ProjectionPacking(projection.bits, projection.group_size, mode)
    mx.eval(weights)
    return weights, ExpertSpec(type(module).__name__, module.activation, packing)


@compiled
@pytest.mark.parametrize("family,bits,group,mode", EXPERTS)
def test_experts_equal_the_reference(
    family: str, bits: int | None, group: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, spec = experts_of(family, bits, group, mode)
    for shape in [(1, 1), (2, 3), (1, 40)]:
        x = mx.random.normal((*shape, 64), key=mx.random.key(1))
        slots = mx.random.randint(0, 8, (*shape, 2), key=mx.random.key(2)).astype(mx.int32)
        expected = reference.expert_forward(x, slots, weights, spec)
        mx.eval(expected)
        with monkeypatch.context() as patch:
            patch.delattr(reference, "expert_forward")
            y = cpu.expert_forward(x, slots, weights, spec)
        assert (y.shape, y.dtype) == (expected.shape, mx.float32)
        assert mx.allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "bits,group,mode,dtype",
    [(4, 16, "nvfp4", mx.float32), (8, 32, "mxfp8", mx.float32), (4, 64, "affine", mx.bfloat16)],
)
def test_what_is_not_covered_goes_to_the_reference(
    bits: int, group: int, mode: str, dtype: mx.Dtype
) -> None:
    weights, spec = experts_of("qwen3_moe", bits, group, mode)
    if mode == "affine":
        weights = {k: v if v.dtype == mx.uint32 else v.astype(dtype) for k, v in weights.items()}
    x = mx.random.normal((3, 64), key=mx.random.key(1)).astype(dtype)
    slots = mx.array([[0, 5], [7, 2], [5, 0]], mx.int32)
    y = cpu.expert_forward(x, slots, weights, spec)
    assert mx.array_equal(y, reference.expert_forward(x, slots, weights, spec))


def test_selection() -> None:
    if native.available() is None:
        assert kernel_names() == ["auto", "reference", "cpu"]
        assert select_kernel("cpu") is cpu.expert_forward
    else:
        assert kernel_names() == ["auto", "reference"]
        with pytest.raises(OptionError, match="kernel cpu is not there"):
            select_kernel("cpu")
    assert select_kernel("auto") is reference.expert_forward


# --- building -----------------------------------------------------------------------------------


def test_the_library_is_there_when_a_compiler_is() -> None:
    assert loader.LIBRARY == build.LIBRARY
    reason = native.available()
    if build.find_compiler() is not None:
        assert reason is None
    elif reason is not None:
        assert "C++ compiler" in reason


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
    check = Path(__file__).with_name("native_check.cpp")
    build.build_library(program, flags=flags, extra=[check], shared=False)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "portable" in done.stdout
