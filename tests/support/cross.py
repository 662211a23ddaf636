"""Compile the native library for machines that are not here, and run what an emulator can run.

The compiler is zig's clang (`ziglang` on PyPI), which brings the headers of every system. For
macOS the library is compiled and linked, and what it exports and imports is read from the file.
For Linux on ARM `tests/native/native_check.cpp` is run by qemu: the NEON kernels against float64.
A tool that is missing is an error, or just a line with --where-possible.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flashmoe.native import build
from tests.support import macho

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = "qemu-aarch64"
# zig has no stub of macOS's libc++ to link with: those names stay open, and are checked here.
OPEN_LIBCXX = ("-nostdlib++", "-Wl,-undefined,dynamic_lookup")
# Names in std, operators new and delete, and what C++ calls without naming it.
LIBCXX = re.compile(r"__Z(T[ISV])?(N?K?St|N10__cxxabiv1)|__Z(nw|na|dl|da)|___cxa_|___gxx_pers")
# zig's linker puts them into every library.
LINKER_EXPORTS = {"___dso_handle", "__mh_dylib_header"}
CHECK_SOURCES = ("native_check.cpp", "attention_check.cpp", "checksum_check.cpp", "fit_check.cpp")


class MissingTool(Exception):
    """What is not installed, and how it is."""


class CheckFailed(Exception):
    """What a check found."""


def find_zig() -> Path:
    """The folder of the ziglang package."""
    found = importlib.util.find_spec("ziglang")
    if found is None or found.origin is None:
        raise MissingTool("ziglang is not installed (pip install --group cross)")
    return Path(found.origin).parent


def find_emulator() -> list[str]:
    """The command that runs a program for Linux on ARM: none where that is what this is."""
    if (platform.system(), platform.machine()) == ("Linux", "aarch64"):
        return []
    found = shutil.which(EMULATOR)
    if found is None:
        raise MissingTool(f"{EMULATOR} is not installed (Debian: apt-get install qemu-user)")
    return [found]


def compile_for(target: str, output: Path, **options: Any) -> None:
    """The library, or a program with it, for one of zig's targets; a warning is an error."""
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", target]
    machine = target.split("-")[0]
    build.build_library(output, compiler=compiler, machine=machine, flags=["-Werror"], **options)


def declared() -> set[str]:
    """The functions of the C interface: everything that a header calls fm_."""
    headers = [path.read_text() for path in Path(build.__file__).parent.glob("*.h")]
    return {name for text in headers for name in re.findall(r"\bfm_\w+(?=\()", text)}


def check_symbols(library: macho.Library, system: set[str]) -> None:
    """That it exports the C interface alone, and imports only what is in libc++ or in `system`,
    the names that libSystem has. Raises CheckFailed.
    """
    interface = {f"_{name}" for name in declared()}
    exports = library.exports - LINKER_EXPORTS
    unknown = {name for name in library.imports - system if not LIBCXX.match(name)}
    for what, names in (
        ("does not export", interface - exports),
        ("exports what no header declares:", exports - interface),
        ("needs what is in neither libSystem nor libc++:", unknown),
    ):
        if names:
            raise CheckFailed(f"the library {what} {', '.join(sorted(names))}")


def check_macos(target: str) -> str:
    stub = find_zig() / "lib" / "libc" / "darwin" / "libSystem.tbd"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / build.LIBRARY
        compile_for(target, output, link_flags=OPEN_LIBCXX)
        library = macho.read_library(output.read_bytes())
    if library.machine != "arm64":
        raise CheckFailed(f"the library is for {library.machine}")
    check_symbols(library, set(re.findall(r"[\w$]+", stub.read_text())))
    return (
        f"linked for {library.machine} and macOS {library.macos}; exports the {len(declared())} "
        "functions of the header, needs libSystem and libc++ alone"
    )


def check_linux(target: str) -> str:
    find_zig()
    emulator = find_emulator()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "native_check"
        extra = [ROOT / "tests" / "native" / name for name in CHECK_SOURCES]
        compile_for(target, program, extra=extra, shared=False)
        done = subprocess.run(
            [*emulator, program, "neon"], text=True, capture_output=True, check=False
        )
    if done.returncode:
        raise CheckFailed(f"native_check ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()


CHECKS: dict[str, Callable[[str], str]] = {
    "aarch64-macos": check_macos,
    # musl: its programs need no files of the machine that they are for.
    "aarch64-linux-musl": check_linux,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--where-possible", action="store_true", help="missing tools are no error")
    where_possible = parser.parse_args(arguments).where_possible
    status = 0
    with ThreadPoolExecutor() as threads:
        running = {target: threads.submit(check, target) for target, check in CHECKS.items()}
    for target, result in running.items():
        try:
            print(f"{target}: {result.result()}")
        except MissingTool as error:
            print(f"{target}: not run, {error}")
            status = status if where_possible else 1
        except (CheckFailed, build.CompilationError, ValueError) as error:
            print(f"{target}: failed, {error}")
            status = 1
    return status
