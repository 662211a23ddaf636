"""Which kernels exist here and which one `auto` means."""

from __future__ import annotations

from flashmoe import native
from flashmoe.errors import OptionError
from flashmoe.kernels import cpu, reference
from flashmoe.kernels.contract import ExpertKernel

AUTO = "reference"


def kernel_names() -> list[str]:
    """The values that `kernel=` accepts."""
    return ["auto", *_kernels()]


def select_kernel(name: str = "auto") -> ExpertKernel:
    """The kernel of that name.

    Raises OptionError for a name that does not exist on this machine.
    """
    chosen = AUTO if name == "auto" else name
    kernels = _kernels()
    if chosen in kernels:
        return kernels[chosen]
    reason = native.available() if chosen == "cpu" else None
    if reason is not None:
        raise OptionError(f"kernel cpu is not there: {reason}")
    raise OptionError(f"kernel must be one of {kernel_names()}, not {name!r}")


def _kernels() -> dict[str, ExpertKernel]:
    kernels: dict[str, ExpertKernel] = {"reference": reference.expert_forward}
    if native.available() is None:
        kernels["cpu"] = cpu.expert_forward
    return kernels
