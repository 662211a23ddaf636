"""Compiling the runner and the kernels, each text once."""

from __future__ import annotations

import atexit
import functools
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashmoe.native.build import find_compiler
from tests.support.metal_on_cpu.faults import CompileFault

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
    "-fsigned-char",
)
# A thread's own variables hold no zeros, nor the last thread's values, until written.
_RUBBISH = "-ftrivial-auto-var-init=pattern"
# In Metal, a floating-point literal without a suffix is a float.
_GCC_FLAGS = (
    "-fsingle-precision-constant",
    # One call in the source stays one call, so that lanes that meet there are seen to.
    "-fno-thread-jumps",
)
_CLANG_FLAGS = (
    *("-Xclang", "-cl-single-precision-constant"),
    # Clang leaves out the read of a += b otherwise.
    *("-mllvm", "-tsan-instrument-read-before-write=1"),
)
_PRELUDE = ("-include", _HERE / "mlx_prelude.h")
# A target that has a 16-bit float; nothing of its system is included.
_CHECK_FLAGS = (
    *("-x", "c++", "-std=c++14", "-w", "-fsyntax-only"),
    *("--target=aarch64-none-elf", "-ffreestanding", "-nostdinc++"),
)
_OLD_CAST = re.compile(r"\(((?:const\s+)?(?:device|constant|threadgroup)\s[^()]*\*)\s*\)\s*\(")


@functools.cache
def _folder() -> Path:
    """Where what is built is kept while this process lives."""
    folder = Path(tempfile.mkdtemp(prefix="metal_on_cpu-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def build_runner() -> Path:
    """The program that runs kernels."""
    compiler = _compiler()
    target = _folder() / "runner"
    sources = [_HERE / "runner" / name for name in _RUNNER]
    _run([compiler, *_FLAGS, "-O2", "-rdynamic", *sources, "-ldl", "-o", target])
    return target


def build_kernel(text: str, entry: str) -> Path:
    """The library of a compilable source. Raises CompileFault with the compiler's first words."""
    compiler = _compiler()
    whole = text + entry
    stem = _folder() / hashlib.sha256(whole.encode()).hexdigest()[:20]
    library, source, compiled = (stem.with_suffix(end) for end in (".so", ".cpp", ".o"))
    if library.exists():
        return library
    check_spaces(text)
    source.write_text(whole)
    own = (*_FLAGS, *_KERNEL_FLAGS, *_own_flags(compiler))
    _run([compiler, *own, f"-I{_HERE / 'words'}", *_PRELUDE, "-c", source, "-o", compiled])
    undefined = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
    _run([compiler, "-shared", *undefined, compiled, "-o", library])
    return library


def compiled(test: Callable[..., None]) -> Callable[..., None]:
    """The test where there is a compiler; elsewhere, that building says that there is none."""

    @functools.wraps(test)
    def without(*args: Any, **kwargs: Any) -> None:
        try:
            build_runner()
        except CompileFault as fault:
            assert "no C++ compiler" in str(fault)

    return test if find_compiler() else without


def _compiler() -> str:
    if compiler := find_compiler():
        return compiler
    raise CompileFault("no C++ compiler (c++, g++ or clang++) was found")


def check_spaces(text: str) -> None:
    """Raises CompileFault where pointers into different address spaces meet.

    Clang can tell them apart; where it is not installed, nothing is checked.
    """
    if clang := shutil.which("clang++"):
        # The old cast would take a pointer from any space into any other.
        text = _OLD_CAST.sub(r"reinterpret_cast<\1>(", text)
        _run([clang, *_CHECK_FLAGS, f"-I{_HERE / 'spaces'}", *_PRELUDE, "-"], text)


def fills_variables() -> bool:
    """Whether the compiler can fill variables with rubbish; GCC can from version 12."""
    compiler = find_compiler()
    return compiler is not None and _RUBBISH in _own_flags(compiler)


@functools.cache
def _own_flags(compiler: str) -> tuple[str, ...]:
    """The flags that this compiler takes and another may not."""
    asked = [compiler, "-x", "c++", "-dM", "-E", "/dev/null"]
    macros = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    own = _CLANG_FLAGS if "__clang__" in macros else _GCC_FLAGS
    filled = subprocess.run([*asked, _RUBBISH], capture_output=True, check=False)
    return own if filled.returncode else (*own, _RUBBISH)


def _run(command: Sequence[str | Path], text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if re.search("error|note: cand", line)]
        raise CompileFault("\n".join(said[:8]) or done.stderr[:2000])
