"""The check of the Metal kernels on NVIDIA GPUs: compiled by nvcc where there is one, and run on
the CPU with stand-ins for CUDA's words and calls (`cuda_on_cpu/`)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flashmoe.kernels.check_cases import make_case
from flashmoe.native.build import find_compiler
from tests.support.metal_on_cpu import compiled, metal_kernel
from tests.support.metal_on_cuda import build, measure
from tests.support.metal_on_cuda import check as script
from tests.support.metal_on_cuda.device import CudaDevice, DeviceError
from tests.support.metal_on_cuda.exact import row_error, wide
from tests.support.metal_on_cuda.requests import Request
from tests.support.metal_on_cuda.source import Variant, sources
from tests.support.metal_on_cuda.trials import (
    FOUR,
    GPT_OSS,
    MXFP4,
    N_SLOTS,
    Trial,
    model_trials,
    short_trials,
    small_trials,
    spread_slots,
)
from tests.support.skips import needs, require

NVCC = build.find_tool("nvcc")
STANDINS = Path(__file__).parents[1] / "support" / "cuda_on_cpu"
SCRIPTS = Path(script.__file__).parent

TINY = [
    Trial("4 bits", make_case(mx.bfloat16, FOUR, d_in=64, hidden=192), 2, 2),
    Trial(
        "mxfp4",
        make_case(mx.float32, MXFP4, d_in=96, hidden=32, activation=GPT_OSS, bias=True),
        *(1, 3),
    ),
]


def name_of(request: Request) -> str:
    return Variant.of(request).name


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CudaDevice]:
    """The device that the stand-ins make of the CPU, with what the tiny trials call."""
    compiler = find_compiler()
    require("a C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    files = [SCRIPTS / "device.cu", STANDINS / "runtime.cpp"]
    for i, text in enumerate(sources([r for trial in TINY for r in trial.requests()], parts=1)):
        files.append(folder / f"{i}.cu")
        files[-1].write_text(text)
    flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-pthread"]
    flags += [f"-I{STANDINS}", f"-I{SCRIPTS / 'words'}"]
    command = [compiler, *flags, "-x", "c++", *files, "-o", folder / "library.so"]
    subprocess.run(command, check=True, timeout=120)
    return CudaDevice(folder / "library.so", name_of)


def test_the_words_and_the_launch(device: CudaDevice) -> None:
    """What nvcc would compile, called as on a GPU."""
    checks = measure.check(device, TINY)
    assert len(checks) == 6
    for check in checks:
        assert check.passed, check
    assert {check.tolerance for check in checks} == {1e-5, 4e-3}


def test_speeds(device: CudaDevice) -> None:
    trial = Trial("4 bits", TINY[0].case, 2, 2, in_order=True)
    copy, checks, speeds = measure.measure(device, [trial], 1, copy_bytes=4096, repeats=2)
    assert copy > 0
    assert [check.passed for check in checks] == [True] * 6
    kernels = ["expert_gate_up", "expert_down", "expert_down, summed"]
    assert [speed.kernel for speed in speeds] == kernels
    # Two bytes for each 4 weights and 4 for each group of 64, twice; x and hidden.
    assert speeds[0].bytes_ == 4 * 2 * 192 * (32 + 4) + 2 * 64 * 2 + 4 * 192 * 4
    for speed in speeds:
        assert speed.slowest <= speed.gb_per_s <= speed.fastest
        assert speed.microseconds == pytest.approx(speed.bytes_ / speed.gb_per_s / 1e3)
        assert speed.of_copy == pytest.approx(speed.gb_per_s * 1e9 / copy)


def test_what_cuda_says_is_told(device: CudaDevice) -> None:
    (request, *_) = TINY[0].requests()
    with pytest.raises(DeviceError, match=r"out of memory \(CUDA error 2 from allocate\)"):
        device.copy_seconds(1 << 60, 1, 1)
    assert mx.isfinite(device.run(request)).all()


@compiled
@pytest.mark.parametrize("trial", TINY, ids=lambda trial: trial.label)
def test_requests_are_the_products(trial: Trial) -> None:
    """The harness runs them too, and agrees with float64."""
    for question in trial.questions():
        request = question.request
        kernel = request.kernel
        run = metal_kernel(kernel.name, kernel.inputs, kernel.outputs, kernel.body, kernel.header())
        (y,) = run(
            inputs=request.inputs,
            template=request.template,
            grid=request.grid,
            threadgroup=request.threadgroup,
            output_shapes=[request.output_shape],
            output_dtypes=[request.output_dtype],
        )
        assert row_error(wide(y), question.expected) <= question.tolerance


def test_a_wrong_output_is_a_failure() -> None:
    class Zeros:
        name = "nothing"

        def run(self, request: Request) -> mx.array:
            return mx.zeros(request.output_shape, request.output_dtype)

    checks = measure.check(Zeros(), TINY)
    assert [check.error for check in checks] == [1.0] * 6
    report = script.Report(device="nothing", checks=checks)
    script.judge(report)
    assert len(report.failures) == 6
    assert "FAILED: expert_gate_up (4 bits): error 1, above 1e-05" in script.table(report)
    assert "0 of 4 outputs within 1e-05 of float64, largest error 1.0e+00" in script.table(report)


def test_spread_slots() -> None:
    """Every slot once, always with the weights that the trial's slots have."""
    trial = Trial("", TINY[0].case, 1, 10, in_order=True)
    slots, copies = spread_slots(trial, calls=5)
    assert slots.shape == (5, 10)
    assert len(np.unique(slots)) == 50
    assert slots.max() < copies * N_SLOTS
    assert (slots % N_SLOTS == trial.slots).all()


def test_trials() -> None:
    """All formats, and the models that the roofline is known for."""
    formats = {
        dict(request.template)["FORMAT"] * 100 + dict(request.template)["BITS"]
        for trial in short_trials()
        for request in trial.requests()
    }
    assert formats == {2, 3, 4, 5, 6, 8, 104, 416}
    lanes = {
        dict(request.template)["LANES"]
        for trial in small_trials()[-8:]
        for request in trial.requests()
    }
    assert lanes == {8, 16, 32}
    qwen = next(trial for trial in model_trials() if trial.label == "Qwen3.5-397B, 4 bits")
    gate_up, down, summed = qwen.requests()
    # 16 rows for each threadgroup of 128 threads.
    assert (gate_up.grid, down.grid) == ((1024 * 8, 10, 1), (4096 * 8, 10, 1))
    assert summed.grid == (4096 * 8, 1, 1)


def test_sources() -> None:
    """Each variant once, the kernel's source as it stands."""
    requests = [request for _ in range(2) for request in TINY[0].requests()]
    texts = sources(requests, parts=2)
    assert len(texts) == 3
    names = {name_of(request) for request in requests}
    assert len(names) == 3
    assert sum(text.count('extern "C" __global__') for text in texts) == 3
    for request in requests:
        (text,) = (text for text in texts if f"&{name_of(request)})" in text)
        assert text.startswith(request.kernel.header())
        assert request.kernel.body in text
    assert "constexpr bool GATED = true;\nconstexpr int LANES = 8;\n" in texts[0]
    assert "const bfloat* x, const int32_t* slots, const int32_t* sizes, const float*" in texts[0]


@needs("a C++ compiler")
@needs("nvcc", NVCC is not None)
def test_nvcc_takes_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """For one architecture, without a warning; where there is no GPU, that is said."""
    monkeypatch.setattr(script, "short_trials", lambda: TINY)
    library = tmp_path / "library.so"
    status = script.main(["--short", "--arch", "80", "--json", "--keep", str(library)])
    report = json.loads(capfd.readouterr().out)
    assert (status, report["failures"]) == (0, [])
    assert len(report["functions"]) == len(report["usage"]) == 6
    assert {usage["architecture"] for usage in report["usage"]} == {"80"}
    assert all(0 < usage["registers"] <= 255 for usage in report["usage"])
    if report["device"] is None:
        (not_run,) = report["not_run"]
        assert not_run.startswith("correctness against float64: ")
        assert script.main(["--short", "--strict", "--library", str(library)]) == 1
        assert "Not run: correctness against float64: " in capfd.readouterr().out
    else:
        assert len(report["checks"]) == 6


@needs("a C++ compiler")
@needs("nvcc", NVCC is not None)
def test_what_nvcc_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(build.CompileError, match="simd_shuffle_sideways"):
        build.build_library(
            NVCC,
            ["#include <metal_stdlib>\n__global__ void k() { metal::simd_shuffle_sideways(1); }"],
            ["80"],
            tmp_path / "library.so",
        )


def test_without_nvcc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "TOOLKIT", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert script.main([]) == 0
    said = capfd.readouterr().out
    assert said.startswith("Not run: everything: nvcc is not on PATH")
    assert said.count("\n") == 1
    assert script.main(["--strict", "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["functions"] == {}


def test_tools_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "TOOLKIT", tmp_path / "toolkit")
    assert build.find_tool("nvcc-for-a-test") is None
    for folder in (tmp_path / "toolkit", tmp_path):
        folder.mkdir(exist_ok=True)
        tool = folder / "nvcc-for-a-test"
        tool.touch(0o755)
        assert build.find_tool(tool.name) == tool
