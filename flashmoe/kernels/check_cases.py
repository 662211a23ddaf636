"""The shape classes that `flashmoe info --check-kernels` goes through: every packing, dtype and
activation once, widths odd and even."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields

import mlx.core as mx
import mlx.nn as nn

from flashmoe.kernels.contract import ExpertSpec, ProjectionPacking
from flashmoe.kernels.self_check import Case
from flashmoe.native import Activation

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


def standard_cases(dtypes: tuple[mx.Dtype, ...] = DTYPES) -> Iterator[tuple[str, Case]]:
    """Shape classes with a short name each."""
    for dtype in dtypes:
        name = str(dtype).rpartition(".")[2]
        for bits in BITS:
            for group in GROUPS:
                packing = ProjectionPacking(bits, group, "affine")
                case = make_case(dtype, packing, d_in=3 * group, hidden=5 * group)
                yield f"affine {bits}/{group}, {name}", case
        mxfp4 = ProjectionPacking(4, 32, "mxfp4")
        yield f"mxfp4, {name}", make_case(dtype, mxfp4, d_in=96, hidden=1056, bias=True)
        yield f"unquantized, {name}", make_case(dtype, None, d_in=72, hidden=1096)
        four = ProjectionPacking(4, 64, "affine")
        for gated, activations in ((True, GATED), (False, UNGATED)):
            for of in activations:
                case = make_case(dtype, four, d_in=64, hidden=64, activation=of, gated=gated)
                yield f"{_describe(of)}{'' if gated else ', no gate'}, {name}", case


def make_case(
    dtype: mx.Dtype,
    packing: ProjectionPacking | None,
    *,
    d_in: int,
    hidden: int,
    activation: Activation | None = None,
    gated: bool = True,
    bias: bool = False,
    held: mx.Dtype | None = None,
) -> Case:
    """Experts d_in -> hidden -> d_in, all projections packed alike; x and, unless `held` is
    given, scales, biases and floating weights in `dtype`."""
    held = held or dtype
    first = ("gate_proj", "up_proj") if gated else ("fc1",)
    last = "down_proj" if gated else "fc2"
    shapes = dict.fromkeys(first, (hidden, d_in)) | {last: (d_in, hidden)}
    tensors: dict[str, tuple[tuple[int, ...], mx.Dtype]] = {}
    for name, (rows, cols) in shapes.items():
        if packing is None:
            tensors[f"{name}.weight"] = ((rows, cols), held)
        else:
            groups = (rows, cols // packing.group_size)
            mx_format = packing.mode == "mxfp4"
            tensors[f"{name}.weight"] = ((rows, cols * packing.bits // 32), mx.uint32)
            tensors[f"{name}.scales"] = (groups, mx.uint8 if mx_format else held)
            if not mx_format:
                tensors[f"{name}.biases"] = (groups, held)
        if bias:
            tensors[f"{name}.bias"] = ((rows,), held)
    packed = {} if packing is None else dict.fromkeys(shapes, packing)
    kind = "SwitchGLU" if gated else "SwitchMLP"
    spec = ExpertSpec(kind, Formula(activation or Activation("sigmoid")), packed)
    return Case(spec, tensors, d_in, dtype)


class Formula:
    """An activation given by its numbers, in MLX's operations, as modules of mlx-lm are: called
    with (up, gate), or with the one input of experts without a gate."""

    def __init__(self, activation: Activation) -> None:
        self.alpha = activation.alpha
        self.limit = min(activation.gate_max, activation.activated_max)
        self.up_bound = activation.up_bound
        self._of = activation

    def __call__(self, up: mx.array, gate: mx.array | None = None) -> mx.array:
        of = self._of
        g = mx.minimum(up if gate is None else gate, of.gate_max)
        if of.kind == "sigmoid":
            a = g * mx.sigmoid(of.alpha * g)
        elif of.kind == "gelu_tanh":
            a = nn.gelu_approx(g)
        elif of.kind == "situ":
            a = of.alpha * mx.tanh(g / of.alpha) * mx.sigmoid(g)
        else:
            a = mx.square(mx.maximum(g, 0))
        a = mx.minimum(a, of.activated_max)
        if gate is None:
            return a
        u = mx.clip(up, -of.up_max, of.up_max)
        if math.isfinite(of.up_bound):
            u = of.up_bound * mx.tanh(u / of.up_bound)
        return a * (u + of.up_shift)


GATED = (
    Activation("sigmoid"),
    Activation("sigmoid", 1.702, gate_max=0.5, up_max=0.5, up_shift=1.0),
    Activation("sigmoid", activated_max=0.5, up_max=0.5),
    Activation("gelu_tanh"),
    Activation("situ", 2.0, up_bound=3.0),
)
UNGATED = (Activation("relu2"), Activation("gelu_tanh"))


def _describe(activation: Activation) -> str:
    default = Activation(activation.kind)
    changed = [
        f"{field.name} {getattr(activation, field.name):g}"
        for field in fields(activation)
        if getattr(activation, field.name) != getattr(default, field.name)
    ]
    return " ".join([activation.kind, *changed])
