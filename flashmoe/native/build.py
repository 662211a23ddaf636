"""Compiling the native library: the one place that knows its sources and their flags.

Standard library only, because setup.py runs this file before the package can be imported.
`python -m flashmoe.native.build` rebuilds the library in place.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIBRARY = "libflashmoe.so"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    # Every fused multiply-add is asked for by name, so that all paths round alike.
    "-ffp-contract=off",
    # Nothing reads errno, and setting it would keep square roots out of vectors.
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-pthread",
)
_Sources = dict[str, tuple[str, ...]]
_COMMON: _Sources = {
    "attention.cpp": (),
    "checksum.cpp": (),
    "dispatch.cpp": (),
    "experts.cpp": (),
    "fit.cpp": (),
    "grouping.cpp": (),
    "matmul.cpp": (),
    "pool.cpp": (),
    "read_pool.cpp": (),
    "reader.cpp": (),
    "rows.cpp": (),
    "transfer.cpp": (),
}
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_X86: _Sources = {
    "checksum_x86.cpp": ("-msha", "-msse4.1", "-mpclmul"),
    "kernels_avx512.cpp": _AVX512,
    "kernels_avx2.cpp": _AVX2,
}
_ARM: _Sources = {"checksum_arm.cpp": (), "kernels_neon.cpp": ()}
_PORTABLE: _Sources = {"kernels_portable.cpp": ()}


class CompilationError(Exception):
    """No compiler, or it refused; the text says which."""


def sources(machine: str | None = None) -> _Sources:
    """Each source file for a machine (this one unless named) with the flags that only it takes."""
    machine = platform.machine() if machine is None else machine
    own: _Sources = {}
    if machine in ("x86_64", "AMD64"):
        own = _X86
    elif machine in ("arm64", "aarch64"):
        own = _ARM
    return {**_COMMON, **own, **_PORTABLE}


def find_compiler() -> str | None:
    """The C++ compiler's path."""
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def build_library(
    target: Path,
    *,
    compiler: Sequence[str] = (),
    machine: str | None = None,
    flags: Sequence[str] = (),
    link_flags: Sequence[str] = (),
    extra: Sequence[Path] = (),
    shared: bool = True,
) -> None:
    """Compile every source for a machine and the `extra` ones and link them to `target`.

    `compiler` is a command in words, such as ["ccache", "g++"], for this machine unless its words
    or flags say otherwise; `machine` names the one it compiles for, as `platform.machine()` does.
    `flags` go to every compilation and to the link, after ours, `link_flags` to the link alone.
    Raises CompilationError.
    """
    if not compiler:
        found = find_compiler()
        if found is None:
            raise CompilationError("no C++ compiler (c++, g++ or clang++) was found")
        compiler = [found]
    here = Path(__file__).parent
    files = [(here / name, own) for name, own in sources(machine).items()]
    files += [(path, ()) for path in extra]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as threads:
        objects = [Path(folder) / f"{path.stem}.o" for path, _ in files]
        commands = [
            [*compiler, *FLAGS, *flags, *own, f"-I{here}", "-c", path, "-o", output]
            for (path, own), output in zip(files, objects, strict=True)
        ]
        list(threads.map(_run, commands))
        linked = Path(folder) / target.name
        kind = ("-shared",) if shared else ()
        _run([*compiler, *kind, "-pthread", *flags, *link_flags, "-o", linked, *objects])
        # Moved into place whole: a process that has the old file loaded keeps it.
        partial = target.with_name(f"{target.name}.partial")
        shutil.copy2(linked, partial)
        partial.replace(target)


def _run(command: Sequence[str | Path]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompilationError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        said = " ".join(done.stderr.split()[:60]) or f"exit status {done.returncode}"
        raise CompilationError(f"{command[0]} failed: {said}")


if __name__ == "__main__":
    build_library(Path(__file__).with_name(LIBRARY))
