"""Compiling CUDA sources with nvcc into one library, and what ptxas says about each function."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
TOOLKIT = Path("/usr/local/cuda/bin")
# Ampere and Hopper, whatever is at hand.
ARCHITECTURES = ("80", "90")

_FLAGS = (
    *("-std=c++17", "-O3", "-lineinfo", "-Wno-deprecated-gpu-targets"),
    *("-Werror", "all-warnings", "-Xcompiler", "-fPIC,-Wall", "-Xptxas", "-v"),
    # A header names all formats; a source that uses some of them is not wrong.
    *("-diag-suppress", "177"),
    f"-I{_HERE / 'words'}",
)
_FUNCTION = re.compile(
    r"entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'"
    r".*?(?P<spilled>\d+) bytes spill stores"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class CompileError(Exception):
    """What nvcc said first."""


@dataclass(frozen=True)
class Usage:
    """What one function takes on one architecture."""

    name: str
    architecture: str
    registers: int
    spilled_bytes: int


def find_tool(name: str) -> Path | None:
    """A program of the CUDA toolkit: on PATH, in the toolkit's usual place, or from PyPI."""
    if found := shutil.which(name):
        return Path(found)
    wheels = importlib.util.find_spec("nvidia")
    places = wheels.submodule_search_locations if wheels else None
    folders = [TOOLKIT, *(bin_ for place in places or () for bin_ in Path(place).glob("*/bin"))]
    return next((folder / name for folder in folders if os.access(folder / name, os.X_OK)), None)


def native_architectures() -> list[str]:
    """Of the GPUs that are at hand, as nvcc numbers them."""
    if not (tool := shutil.which("nvidia-smi")):
        return []
    asked = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    found = re.findall(r"^(\d+)\.(\d+)$", done.stdout, re.MULTILINE) if not done.returncode else []
    return sorted({major + minor for major, minor in found})


def build_library(
    nvcc: Path, texts: Sequence[str], architectures: Sequence[str], library: Path
) -> list[Usage]:
    """Compile the texts and `device.cu` side by side, no warnings allowed. Raises CompileError."""
    folder = library.parent
    jobs = [_HERE / "device.cu"]
    for number, text in enumerate(texts):
        jobs.append(folder / f"part_{number}.cu")
        jobs[-1].write_text(text)
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    # For what is newer than all of them.
    targets.append("-gencode=arch=compute_{0},code=compute_{0}".format(architectures[-1]))

    def compile_one(source: Path) -> tuple[Path, str]:
        target = folder / f"{source.stem}.o"
        return target, _run([nvcc, *_FLAGS, *targets, "-c", source, "-o", target])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compile_one, jobs))
    _run([nvcc, "-shared", *(target for target, _ in compiled), "-o", library])
    return [
        Usage(m["name"], m["architecture"], int(m["registers"]), int(m["spilled"]))
        for _, said in compiled
        for m in _FUNCTION.finditer(said)
    ]


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise CompileError("\n".join(said[:8]) or done.stderr[:2000])
    return done.stdout + done.stderr
