"""What a routed-experts kernel is given and must return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int32]


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


# y[..., j, :] = expert(slots[..., j]) applied to x[..., :].
#
# `x` [..., d_in] float, `slots` [..., k] on the host; the result is [..., k, d_out] in x's dtype
# and may be unevaluated. The result of a row depends on that row, its experts' weights and, at
# most, on how many rows of the call each of its experts has: never on the number of slots, or on
# which slot an expert is in.
ExpertForward = Callable[[mx.array, Slots], mx.array]


class ExpertKernel(Protocol):
    """Binds a bank's arrays once; what it returns is called for every token.

    `weights` maps "projection.tensor" to the bank's array [n_slots, ...]. The arrays are kept,
    and what is written into them later is what the calls see.
    """

    def __call__(self, weights: Mapping[str, mx.array], spec: ExpertSpec) -> ExpertForward: ...
