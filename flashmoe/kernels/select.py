"""Which kernels exist here and which one `auto` means."""

from __future__ import annotations

from collections.abc import Mapping
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


def missing_kernels() -> dict[str, str | None]:
    """Of each kernel, why it cannot run here; None when it can."""
    return {name: _missing(name) for name in _KERNELS}


def choose_kernel(name: str, missing: Mapping[str, str | None], *, on_cpu: bool) -> tuple[str, str]:
    """The kernel that `name` stands for, and why it is that one.

    "auto" takes the kernel written for the device that MLX computes on, or the reference where
    that cannot run (`missing` says why). Raises OptionError for one that does not exist or run.
    """
    if name != "auto":
        if name not in missing:
            raise OptionError(f"kernel must be one of {kernel_names()}, not {name!r}")
        problem = missing[name]
        if problem is not None:
            raise OptionError(f"kernel {name} is not there: {problem}")
        return name, "as asked"
    own = "cpu" if on_cpu else "metal"
    problem = missing[own]
    if problem is None:
        return own, "written for the device that MLX computes on"
    return "reference", f"MLX's own operations, because {own} cannot run: {problem}"


def auto_kernel() -> str:
    """What `auto` means here."""
    return resolve_kernel()


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
    return choose_kernel(name, missing_kernels(), on_cpu=mx.default_device() == mx.cpu)[0]


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
