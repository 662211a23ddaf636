"""Which kernels exist here and which one `auto` means."""

from __future__ import annotations

from flashmoe.errors import OptionError
from flashmoe.kernels.contract import ExpertKernel
from flashmoe.kernels.reference import expert_forward

_KERNELS: dict[str, ExpertKernel] = {"reference": expert_forward}
AUTO = "reference"


def kernel_names() -> list[str]:
    """The values that `kernel=` accepts."""
    return ["auto", *_KERNELS]


def select_kernel(name: str = "auto") -> ExpertKernel:
    """The kernel of that name.

    Raises OptionError for a name that does not exist on this machine.
    """
    chosen = AUTO if name == "auto" else name
    if chosen not in _KERNELS:
        raise OptionError(f"kernel must be one of {kernel_names()}, not {name!r}")
    return _KERNELS[chosen]
