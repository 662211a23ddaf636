"""The Metal kernels on an NVIDIA GPU: correctness against float64, and GB/s beside its copies.

The sources in metal/ are compiled with nvcc through scripts/metal_on_cuda/words, for sm_80, sm_90
and the GPUs at hand, and called as flashmoe calls them. Where there is no GPU they are compiled,
and what was not run is said. How fast they are there tells nothing about Apple GPUs; that they
read each byte once, in an order that a GPU's memory likes, carries over.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.support.metal_on_cuda.build import (
    ARCHITECTURES,
    CompileError,
    Usage,
    build_library,
    find_tool,
    native_architectures,
)
from tests.support.metal_on_cuda.device import CudaDevice, DeviceError
from tests.support.metal_on_cuda.measure import Check, Speed, check, measure
from tests.support.metal_on_cuda.source import Variant, sources
from tests.support.metal_on_cuda.trials import Trial, model_trials, short_trials, small_trials

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
_FOUND_SOMETHING = 9


SCRIPT = Path(__file__).parents[3] / "scripts" / "check_metal_on_cuda.py"


@dataclass
class Report:
    """What was done, and what was not."""

    architectures: list[str] = field(default_factory=list)
    functions: dict[str, str] = field(default_factory=dict)
    compile_seconds: float = 0.0
    usage: list[Usage] = field(default_factory=list)
    device: str | None = None
    copy_gb_per_s: float | None = None
    checks: list[Check] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    sanitizers: dict[str, str] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 where something failed or, with --strict, was not run."""
    options = parse(arguments)
    small = short_trials() if options.short else small_trials()
    models = [] if options.short else model_trials()
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        library = options.compiled or Path(folder) / "libkernels.so"
        if options.compiled or compile_all([*small, *models], options, library, report):
            run_all(library, small, models, report)
            if options.sanitize:
                sanitize(library, report)
    print(json.dumps(asdict(report)) if options.json else table(report))
    return int(bool(report.failures or (options.strict and report.not_run)))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--short", action="store_true", help="a few small shapes, not timed")
    parser.add_argument("--sanitize", action="store_true", help="run these in compute-sanitizer")
    parser.add_argument("--strict", action="store_true", help="fail where something was not run")
    parser.add_argument("--arch", nargs="+", metavar="NN", help="compile for sm_NN alone")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep the compiled library")
    parser.add_argument(
        "--library",
        dest="compiled",
        type=Path,
        metavar="FILE",
        help="a kept library, instead of compiling",
    )
    return parser.parse_args(arguments)


def compile_all(
    trials: Sequence[Trial], options: argparse.Namespace, library: Path, report: Report
) -> bool:
    """Whether there is a library now."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        report.not_run.append(
            "everything: nvcc is not on PATH, in /usr/local/cuda/bin or installed from PyPI "
            "(nvidia-cuda-nvcc), so nothing was compiled"
        )
        return False
    started = time.perf_counter()
    wanted = options.arch or {*ARCHITECTURES, *native_architectures()}
    report.architectures = sorted(wanted, key=int)
    requests = [request for trial in trials for request in trial.requests()]
    report.functions = {variant.name: str(variant) for variant in map(Variant.of, requests)}
    texts = sources(requests, parts=os.cpu_count() or 1)
    try:
        report.usage = build_library(nvcc, texts, report.architectures, library)
    except CompileError as error:
        report.failures.append(f"nvcc: {error}")
        return False
    report.compile_seconds = time.perf_counter() - started
    if options.keep:
        shutil.copy(library, options.keep)
    return True


def run_all(library: Path, small: Sequence[Trial], models: Sequence[Trial], report: Report) -> None:
    try:
        device = CudaDevice(library, lambda request: Variant.of(request).name)
    except DeviceError as reason:
        report.not_run.append(f"correctness against float64: {reason}")
        if models:
            report.not_run.append("speed beside the device's copies: as above")
        return
    report.device = device.name
    try:
        report.checks = check(device, small)
        if models:
            copy, checks, report.speeds = measure(device, models)
            report.copy_gb_per_s = copy / 1e9
            report.checks += checks
    except DeviceError as error:
        report.failures.append(str(error))
    judge(report)


def judge(report: Report) -> None:
    """Wrong outputs are failures."""
    report.failures += [
        f"{c.kernel} ({c.trial}): error {c.error:.2g}, above {c.tolerance:.0e}"
        for c in report.checks
        if not c.passed
    ]


def sanitize(library: Path, report: Report) -> None:
    """The short trials under each tool of compute-sanitizer."""
    sanitizer = find_tool("compute-sanitizer")
    if sanitizer is None or report.device is None:
        reason = "no GPU" if sanitizer else "it was not found"
        report.not_run.append(f"compute-sanitizer ({', '.join(SANITIZERS)}): {reason}")
        return
    child = [sys.executable, str(SCRIPT), "--short", "--strict", "--library", library]
    for tool in SANITIZERS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(_FOUND_SOMETHING), *child]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        report.sanitizers[tool] = "failed" if done.returncode else "clean"
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).splitlines()[:20])
            report.failures.append(f"compute-sanitizer --tool {tool}: {said}")


def table(report: Report) -> str:
    lines = [*_compiled(report), *_checked(report), *_speeds(report)]
    lines += [f"compute-sanitizer {tool}: {found}" for tool, found in report.sanitizers.items()]
    lines += [f"Not run: {what}" for what in report.not_run]
    lines += [f"FAILED: {what}" for what in report.failures]
    return "\n".join(lines)


def _compiled(report: Report) -> list[str]:
    if not report.usage:
        return []
    lines = [
        f"compiled {len(report.functions)} functions for "
        f"{', '.join('sm_' + a for a in report.architectures)} in {report.compile_seconds:.0f} s, "
        "no warnings"
    ]
    for architecture in report.architectures:
        mine = [usage for usage in report.usage if usage.architecture == architecture]
        spilled = [usage.spilled_bytes for usage in mine if usage.spilled_bytes]
        lines.append(
            f"  sm_{architecture}: {min(u.registers for u in mine)} to "
            f"{max(u.registers for u in mine)} registers, {len(spilled)} functions spill "
            f"({max(spilled, default=0)} bytes at most)"
        )
    return lines


def _checked(report: Report) -> list[str]:
    lines = []
    for tolerance in sorted({c.tolerance for c in report.checks}):
        mine = [c for c in report.checks if c.tolerance == tolerance]
        passed = sum(c.passed for c in mine)
        lines.append(
            f"{report.device}: {passed} of {len(mine)} outputs within {tolerance:.0e} of float64, "
            f"largest error {max(c.error for c in mine):.1e}"
        )
    return lines


def _speeds(report: Report) -> list[str]:
    if report.copy_gb_per_s is None:
        return []
    lines = [
        f"copies of 1 GiB: {report.copy_gb_per_s:.0f} GB/s read and written; "
        "a like copy moves as many bytes as the call",
        f"{'experts':<32} {'kernel':<20} {'MB':>6} {'us':>7} {'GB/s (range)':>20} "
        f"{'of copy':>8} {'of like copy':>13}",
    ]
    for s in report.speeds:
        rate = f"{s.gb_per_s:.0f} ({s.slowest:.0f} to {s.fastest:.0f})"
        lines.append(
            f"{s.trial:<32} {s.kernel:<20} {s.bytes_ / 1e6:>6.1f} {s.microseconds:>7.1f} "
            f"{rate:>20} {s.of_copy:>8.0%} {s.of_like_copy:>13.0%}"
        )
    return lines
