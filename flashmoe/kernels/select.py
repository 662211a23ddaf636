"""Which kernels exist here and which one `auto` means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from flashmoe import native
from flashmoe.base.errors import OptionError
from flashmoe.kernels import cpu, metal, reference
from flashmoe.kernels.check_verdicts import Verdicts
from flashmoe.kernels.contract import ExpertKernel
from flashmoe.kernels.metal_source import sources_digest
from flashmoe.kernels.self_check import Checker

VERDICTS_FILE = "kernel-checks.json"

_KERNELS: dict[str, ExpertKernel] = {
    "metal": metal.bind_experts,
    "cpu": cpu.bind_experts,
    "reference": reference.bind_experts,
}


@dataclass(frozen=True)
class KernelStatus:
    """A kernel, whether it can run here, and what there is to say about it."""

    name: str
    available: bool
    note: str


def auto_kernel() -> str:
    """What `auto` means: the kernels written for the device that MLX computes on, where they
    can run."""
    name = "cpu" if mx.default_device() == mx.cpu else "metal"
    return name if _missing(name) is None else "reference"


def kernel_names() -> list[str]:
    """The values that `kernel=` accepts here."""
    return ["auto", *(status.name for status in kernel_statuses() if status.available)]


def kernel_statuses() -> list[KernelStatus]:
    """Every kernel of this package."""
    statuses = [KernelStatus("reference", True, "MLX's own operations")]
    for name in ("cpu", "metal"):
        missing = _missing(name)
        statuses.append(KernelStatus(name, missing is None, missing or _note(name)))
    return statuses


def resolve_kernel(name: str = "auto") -> str:
    """The name of the kernel that `name` stands for.

    Raises OptionError for one that does not exist, or cannot run, on this machine.
    """
    chosen = auto_kernel() if name == "auto" else name
    if chosen not in _KERNELS:
        raise OptionError(f"kernel must be one of {kernel_names()}, not {name!r}")
    missing = _missing(chosen)
    if missing is not None:
        raise OptionError(f"kernel {chosen} is not there: {missing}")
    return chosen


def select_kernel(name: str = "auto", folder: Path | None = None) -> ExpertKernel:
    """The kernel of that name; raises OptionError as `resolve_kernel` does.

    The Metal kernels are checked on first use of a shape class, and what was found is kept in
    `folder`.
    """
    chosen = resolve_kernel(name)
    kernel = _KERNELS[chosen]
    if chosen != "metal":
        return kernel
    verdicts = Verdicts(None if folder is None else folder / VERDICTS_FILE)
    checker = Checker(chosen, kernel, metal.covers_experts, sources_digest(), verdicts)
    return checker.bind_experts


def select_prompt_kernel(name: str = "auto") -> ExpertKernel:
    """What a kernel of that name is for prompts; raises OptionError as `resolve_kernel` does.

    Its calls hold all rows that an expert has, and are cut between experts as memory allows.
    So it must not choose by how many rows a call has, which the Metal kernels do.
    """
    chosen = resolve_kernel(name)
    return metal.bind_prompts if chosen == "metal" else _KERNELS[chosen]


def checkable_kernels() -> dict[str, tuple[ExpertKernel, tuple[mx.Dtype, ...]]]:
    """The kernels that run here and have a twin to be held against, with their dtypes of x."""
    dtypes: dict[str, tuple[mx.Dtype, ...]] = {
        "cpu": (mx.float32,),
        "metal": (mx.float32, mx.float16, mx.bfloat16),
    }
    return {name: (_KERNELS[name], dtypes[name]) for name in dtypes if _missing(name) is None}


def _missing(name: str) -> str | None:
    """Why a kernel cannot run here; None when it can."""
    if name == "cpu":
        return native.available()
    return metal.available() if name == "metal" else None


def _note(name: str) -> str:
    if name == "cpu":
        return f"native library in float32, {native.isa()}, {native.threads()} threads"
    return "expert_gate_up and expert_down for decode steps, checked on first use"
