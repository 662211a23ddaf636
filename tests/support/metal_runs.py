"""Running one small Metal kernel in a test."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from tests.support.metal_on_cpu import metal_kernel

Outputs = Mapping[str, tuple[tuple[int, ...], mx.Dtype]]


def run_kernel(
    body: str,
    inputs: Mapping[str, mx.array],
    outputs: Outputs,
    *,
    header: str = "",
    threads: tuple[int, ...] = (32,),
    group: tuple[int, ...] = (32,),
    template: list[tuple[str, object]] | None = None,
    offsets: Mapping[str, int] | None = None,
    init_value: float | None = None,
) -> list[mx.array]:
    """The outputs of the kernel with that body, on `threads` threads in groups of `group`."""
    kernel = metal_kernel("test", list(inputs), list(outputs), body, header, offsets=offsets)
    return kernel(
        inputs=list(inputs.values()),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        grid=(*threads, 1, 1)[:3],
        threadgroup=(*group, 1, 1)[:3],
        template=template,
        init_value=init_value,
    )
