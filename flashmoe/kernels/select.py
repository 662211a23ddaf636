"""Which kernels exist here and which one `auto` means."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from flashmoe import native
from flashmoe.errors import OptionError
from flashmoe.kernels import cpu, reference
from flashmoe.kernels.contract import ExpertKernel

_KERNELS: dict[str, ExpertKernel] = {
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
    """What `auto` means: the native kernels where MLX computes on the CPU and they were built."""
    on_cpu = mx.default_device() == mx.cpu
    return "cpu" if on_cpu and native.available() is None else "reference"


def kernel_names() -> list[str]:
    """The values that `kernel=` accepts here."""
    return ["auto", *(status.name for status in kernel_statuses() if status.available)]


def kernel_statuses() -> list[KernelStatus]:
    """Every kernel of this package."""
    missing = native.available()
    if missing is None:
        note = f"native library in float32, {native.isa()}, {native.threads()} threads"
    else:
        note = missing
    return [
        KernelStatus("reference", True, "MLX's own operations"),
        KernelStatus("cpu", missing is None, note),
    ]


def resolve_kernel(name: str = "auto") -> str:
    """The name of the kernel that `name` stands for.

    Raises OptionError for one that does not exist, or cannot run, on this machine.
    """
    chosen = auto_kernel() if name == "auto" else name
    if chosen not in _KERNELS:
        raise OptionError(f"kernel must be one of {kernel_names()}, not {name!r}")
    missing = native.available()
    if chosen == "cpu" and missing is not None:
        raise OptionError(f"kernel cpu is not there: {missing}")
    return chosen


def select_kernel(name: str = "auto") -> ExpertKernel:
    """The kernel of that name; raises OptionError as `resolve_kernel` does."""
    return _KERNELS[resolve_kernel(name)]
