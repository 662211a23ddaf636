"""Routed experts for many rows at once: one matrix product per expert and projection.

For prompts, where every expert has several rows. Which of MLX's kernels a row meets depends on
how many rows its expert has, so on the routing alone. MLX's own sorted gather_qmm would choose
by rows per slot of the array that it is handed, and so by the size of the bank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flashmoe.kernels.contract import ExpertForward, ExpertSpec, Slots


def bind_experts(weights: Mapping[str, mx.array], spec: ExpertSpec) -> ExpertForward:
    """`grouped_forward` over these weights; see `contract.ExpertKernel`."""

    def forward(x: mx.array, slots: Slots) -> mx.array:
        return grouped_forward(x, slots, weights, spec)

    return forward


def grouped_forward(
    x: mx.array, slots: Slots, weights: Mapping[str, mx.array], spec: ExpertSpec
) -> mx.array:
    """Routed experts over a bank; see `contract.ExpertForward` for shapes. Unevaluated.

    Not for projections with a global scale (nvfp4), which MLX multiplies in gather_qmm only.
    """
    flat = slots.reshape(-1)
    order = np.argsort(flat, kind="stable")
    used, starts = np.unique(flat[order], return_index=True)
    ends = [*starts[1:].tolist(), len(flat)]
    groups = [_Group(*group) for group in zip(used.tolist(), starts.tolist(), ends, strict=True)]
    rows = x.reshape(-1, x.shape[-1])[mx.array(order // slots.shape[-1])]
    if spec.kind == "SwitchGLU":
        up = _project("up_proj", rows, groups, weights, spec)
        gate = _project("gate_proj", rows, groups, weights, spec)
        y = _project("down_proj", spec.activation(up, gate), groups, weights, spec)
    else:
        hidden = spec.activation(_project("fc1", rows, groups, weights, spec))
        y = _project("fc2", hidden, groups, weights, spec)
    restore = np.empty_like(order)
    restore[order] = np.arange(len(order))
    return y[mx.array(restore)].reshape(*slots.shape, y.shape[-1])


@dataclass(frozen=True)
class _Group:
    """The rows of one slot among the sorted ones."""

    slot: int
    start: int
    end: int


def _project(
    name: str,
    rows: mx.array,
    groups: list[_Group],
    weights: Mapping[str, mx.array],
    spec: ExpertSpec,
) -> mx.array:
    """Rows sorted by slot, each times its slot's matrix: [n, d_out]."""
    packing = spec.packing.get(name)
    weight = weights[f"{name}.weight"]
    bias = weights.get(f"{name}.bias")
    parts = []
    for group in groups:
        x = rows[group.start : group.end]
        # A slot of a row-contiguous bank is a view, not a copy.
        if packing is None:
            y = x @ weight[group.slot].T
        else:
            biases = weights.get(f"{name}.biases")
            y = mx.quantized_matmul(
                x,
                weight[group.slot],
                weights[f"{name}.scales"][group.slot],
                None if biases is None else biases[group.slot],
                transpose=True,
                group_size=packing.group_size,
                bits=packing.bits,
                mode=packing.mode,
            )
        parts.append(y if bias is None else y + bias[group.slot])
    return mx.concatenate(parts)
