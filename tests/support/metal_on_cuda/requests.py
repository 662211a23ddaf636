"""What flashmoe asks of `mx.fast.metal_kernel`, recorded instead of run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import mlx.core as mx

from flashmoe.kernels import metal, metal_experts
from flashmoe.kernels.metal_source import KernelSource


@dataclass(frozen=True)
class Request:
    """One call of a kernel; `inputs` are in the order of the kernel's names."""

    kernel: KernelSource
    inputs: tuple[mx.array, ...]
    template: tuple[tuple[str, int | bool], ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shape: tuple[int, ...]
    output_dtype: mx.Dtype


@contextmanager
def recorded() -> Iterator[list[Request]]:
    """Within it, kernels return zeros, and the list gets their calls."""
    requests: list[Request] = []

    def build(kernel: KernelSource) -> Any:
        def call(
            *,
            inputs: list[mx.array],
            template: list[tuple[str, int | bool]],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            output_shapes: list[tuple[int, ...]],
            output_dtypes: list[mx.Dtype],
        ) -> list[mx.array]:
            (shape,), (dtype,) = output_shapes, output_dtypes
            requests.append(
                Request(kernel, tuple(inputs), tuple(template), grid, threadgroup, shape, dtype)
            )
            return [mx.zeros(shape, dtype)]

        return call

    # MLX's arrays begin anywhere on a CPU; on the device each is on a page of its own.
    with (
        mock.patch.object(metal, "build", build),
        mock.patch.object(metal_experts, "address", lambda array: 0),
    ):
        yield requests
