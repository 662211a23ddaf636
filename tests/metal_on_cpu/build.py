"""Compiling the runner and the kernels, each text once."""

from __future__ import annotations

import atexit
import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flashmoe.native.build import find_compiler
from metal_on_cpu.faults import CompileFault

__all__ = ["build_kernel", "build_runner", "find_compiler"]

_HERE = Path(__file__).parent
_RUNNER = ("runner.cpp", "lockstep.cpp", "memory.cpp", "hooks.cpp")
_FLAGS = ("-std=c++17", "-fPIC", "-w")
_KERNEL_FLAGS = (
    "-O1",
    "-g1",
    # Only the compiler's half of these sanitizers: the runner is their library.
    "-fsanitize=thread",
    "-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-stack-protector",
    # One call in the source stays one call, so that lanes that meet there are seen to.
    "-fno-thread-jumps",
    # In Metal, a floating-point literal without a suffix is a float.
    "-fsingle-precision-constant",
)


@functools.cache
def _folder() -> Path:
    """Where what is built is kept while this process lives."""
    folder = Path(tempfile.mkdtemp(prefix="metal_on_cpu-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def build_runner() -> Path:
    """The program that runs kernels."""
    compiler = find_compiler()
    assert compiler, "no C++ compiler"
    target = _folder() / "runner"
    sources = [_HERE / "runner" / name for name in _RUNNER]
    _run([compiler, *_FLAGS, "-O2", "-rdynamic", *sources, "-ldl", "-o", target])
    return target


def build_kernel(text: str) -> Path:
    """The library of a compilable source. Raises CompileFault with the compiler's first words."""
    compiler = find_compiler()
    assert compiler, "no C++ compiler"
    stem = _folder() / hashlib.sha256(text.encode()).hexdigest()[:20]
    library = stem.with_suffix(".so")
    if library.exists():
        return library
    stem.with_suffix(".cpp").write_text(text)
    compiled = stem.with_suffix(".o")
    prelude = (f"-I{_HERE / 'include'}", "-include", "mlx_prelude.h")
    source = stem.with_suffix(".cpp")
    _run([compiler, *_FLAGS, *_KERNEL_FLAGS, *prelude, "-c", source, "-o", compiled])
    _run([compiler, "-shared", compiled, "-o", library])
    return library


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line]
        raise CompileFault("\n".join(said[:8]) or done.stderr[:2000])
