"""The readable twin of every kernel, in stock MLX operations.

Byte for byte what mlx-lm's SwitchGLU and SwitchMLP compute below their sorting threshold: the
same gather_qmm and gather_mm calls, with slots of the bank in place of experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from flashmoe.kernels.contract import ExpertForward, ExpertSpec, Slots


def bind_experts(weights: Mapping[str, mx.array], spec: ExpertSpec) -> ExpertForward:
    """`expert_forward` over these weights; see `contract.ExpertKernel`."""

    def forward(x: mx.array, slots: Slots) -> mx.array:
        return expert_forward(x, mx.array(slots), weights, spec)

    return forward


def expert_forward(
    x: mx.array, slots: mx.array, weights: Mapping[str, mx.array], spec: ExpertSpec
) -> mx.array:
    """Routed experts over a bank; see `contract.ExpertForward` for shapes. Unevaluated.

    Rows are never sorted: MLX picks its grouped kernel by the size of the array it is handed,
    which here is the bank's, and rounding must not depend on that.
    """
    x = mx.expand_dims(x, (-2, -3))
    if spec.kind == "SwitchGLU":
        up = _project("up_proj", x, slots, weights, spec)
        gate = _project("gate_proj", x, slots, weights, spec)
        y = _project("down_proj", spec.activation(up, gate), slots, weights, spec)
    else:
        hidden = spec.activation(_project("fc1", x, slots, weights, spec))
        y = _project("fc2", hidden, slots, weights, spec)
    return y.squeeze(-2)


def _project(
    name: str,
    x: mx.array,
    slots: mx.array,
    weights: Mapping[str, mx.array],
    spec: ExpertSpec,
) -> mx.array:
    weight = weights[f"{name}.weight"]
    packing = spec.packing.get(name)
    if packing is None:
        y = mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=slots)
    else:
        y = mx.gather_qmm(
            x,
            weight,
            weights[f"{name}.scales"],
            weights.get(f"{name}.biases"),
            rhs_indices=slots,
            transpose=True,
            group_size=packing.group_size,
            bits=packing.bits,
            mode=packing.mode,
            global_scale=weights.get(f"{name}.global_scale"),
        )
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + mx.expand_dims(bias[slots], -2)
