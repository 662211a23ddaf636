"""The Metal kernels as MLX takes them: a header of whole functions, and a body that calls one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

METAL_FOLDER = Path(__file__).parents[1] / "metal"

_INCLUDE = re.compile(r'^#include "(.+)"\n', re.MULTILINE)

# Two tiles of rows.h.
_TILES = "threadgroup float tiles[2 * flashmoe::TILE_FLOATS];"
_POSITION = (
    "threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup"
)
_PARTS = ("weight", "scales", "biases", "bias")


@dataclass(frozen=True)
class KernelSource:
    """What `mx.fast.metal_kernel` is given, apart from the header."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str

    def header(self, folder: Path = METAL_FOLDER) -> str:
        """`NAME.metal` with its own includes put in, each once; system includes stay."""
        return resolve_includes(folder / f"{self.name}.metal")


def _matrix(name: str) -> str:
    arguments = ", ".join(f"{name}_{part}" for part in _PARTS)
    return f"flashmoe::make_matrix<FORMAT, BITS, GROUP, HAS_BIAS>({arguments})"


def _names(name: str) -> tuple[str, ...]:
    return tuple(f"{name}_{part}" for part in _PARTS)


EXPERT_GATE_UP = KernelSource(
    "expert_gate_up",
    ("x", "slots", "sizes", "limits", *_names("gate"), *_names("up")),
    ("hidden",),
    f"{_TILES}\n"
    f"flashmoe::expert_gate_up<GATED, LANES>(x, slots, {_matrix('gate')}, {_matrix('up')}, "
    f"sizes, limits, hidden, tiles, {_POSITION});",
)

EXPERT_DOWN = KernelSource(
    "expert_down",
    ("hidden", "slots", "scores", "sizes", *_names("down")),
    ("y",),
    f"{_TILES}\n"
    f"flashmoe::expert_down<SCORED, LANES>(hidden, slots, scores, {_matrix('down')}, "
    f"sizes, y, tiles, {_POSITION});",
)

KERNELS = (EXPERT_GATE_UP, EXPERT_DOWN)


def resolve_includes(path: Path) -> str:
    """The text of a source with `#include "..."` replaced by the files, each once."""
    seen: set[Path] = set()

    def read(file: Path) -> str:
        if file in seen:
            return ""
        seen.add(file)
        text = file.read_text(encoding="utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda found: read(file.parent / found[1]), text)

    return read(path)


def sources_digest() -> str:
    """Changes whenever a kernel does."""
    text = "".join(kernel.header() + kernel.body for kernel in KERNELS)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def build(kernel: KernelSource) -> Callable[..., list[mx.array]]:
    """The callable of `mx.fast.metal_kernel`, made once.

    Metal compiles it when a result is evaluated, once for every set of template arguments.
    Making it needs no GPU; calling it raises RuntimeError where there is none.
    """
    make: Any = mx.fast.metal_kernel
    made: Callable[..., list[mx.array]] = make(
        name=f"flashmoe_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        header=kernel.header(),
        source=kernel.body,
    )
    return made
