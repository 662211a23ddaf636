"""What a routed-experts kernel is given and must return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx


@dataclass(frozen=True)
class ProjectionPacking:
    """MLX's parameters of one quantized projection."""

    bits: int
    group_size: int
    mode: str


@dataclass(frozen=True)
class ExpertSpec:
    """The routed experts of one layer, apart from their weights.

    `kind` is SwitchGLU (activation(up, gate), then down) or SwitchMLP (fc1, activation, fc2);
    a projection missing from `packing` is not quantized.
    """

    kind: str
    activation: Callable[..., mx.array]
    packing: Mapping[str, ProjectionPacking]


class ExpertKernel(Protocol):
    """y[..., j, :] = expert(slots[..., j]) applied to x[..., :].

    `x` [..., d_in] float, `slots` [..., k] int32, `weights` maps "projection.tensor" to the
    bank's array [n_slots, ...]; the result is [..., k, d_out] in x's dtype, unevaluated. The
    result of a row depends on that row and its experts' weights alone: never on n_slots, on
    which slot an expert is in, or on the other rows.
    """

    def __call__(
        self, x: mx.array, slots: mx.array, weights: Mapping[str, mx.array], spec: ExpertSpec
    ) -> mx.array: ...
