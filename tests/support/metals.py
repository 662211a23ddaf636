"""What tests of the Metal kernels share: the harness in MLX's place, and experts in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flashmoe.kernels import metal, metal_experts
from flashmoe.kernels.metal_source import METAL_FOLDER, KernelSource
from tests.support.metal_on_cpu import metal_kernel
from tests.support.metal_on_cuda.exact import dense_weights, experts_in_float64, row_error, wide

__all__ = ["dense_weights", "experts_in_float64", "harness", "row_error", "wide"]


@contextmanager
def harness(folder: Path = METAL_FOLDER) -> Iterator[None]:
    """Within it, the kernels of `folder` run on the CPU, under watch."""
    built = {}

    def build(kernel: KernelSource) -> object:
        if kernel not in built:
            names = (f"flashmoe_{kernel.name}", kernel.inputs, kernel.outputs)
            built[kernel] = metal_kernel(*names, kernel.body, kernel.header(folder))
        return built[kernel]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metal, "build", build)
        # Here MLX's arrays begin anywhere; the harness puts each at a place of its own.
        patch.setattr(metal_experts, "address", lambda array: 0)
        yield
