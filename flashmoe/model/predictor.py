"""Predicting a layer's routed experts from what the experts of the layer before it are given.

Both layers' routers see the residual stream, normalised and multiplied by a weight of their own.
Rescaling one input by the ratio of the weights gives the other, but for what the layers in
between add.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from flashmoe.checkpoint.config import Config
from flashmoe.model.router_scoring import Scoring, logits_of, top
from flashmoe.model.routing_sites import Site, find_sites

# Norms that are the same but for their weights differ by rounding, in 16-bit floats by this much.
_CLOSE = 2e-2


@dataclass(frozen=True, eq=False)
class Predictor:
    """Predictions which experts the next layer's router will choose.

    `router` is that layer's own; `scale` and `shift`, float32 [d], turn this layer's expert
    input into the router's. `top_k` and `n_experts` are the next layer's.
    """

    router: nn.Module
    bias: mx.array | None
    scoring: Scoring
    scale: mx.array
    shift: mx.array | None
    top_k: int
    n_experts: int

    def __call__(self, x: mx.array, count: int | None = None) -> mx.array:
        """int32 [count], likeliest first; `count` is the next layer's top-k unless given.

        `x` [..., d] is one token. Nothing is evaluated unless the router's product does.
        """
        routed = x.reshape(1, x.shape[-1]).astype(mx.float32) * self.scale
        if self.shift is not None:
            routed = routed + self.shift
        logits = logits_of(self.router, routed.astype(x.dtype))
        return top(self.scoring(logits, self.bias), count or self.top_k)[0]


def find_predictors(model: nn.Module, config: Config) -> tuple[Predictor | None, ...]:
    """Per routed-expert layer, in the model's order, the predictor of the layer after it; None
    for the last, and where the next layer's routing cannot be told from this one's input.

    `config` is the one that `model` was built from, its weights loaded. The model is only read.
    """
    modules = dict(model.named_modules())
    sites = list(find_sites(config).values())
    found = [_predictor(modules, here, after) for here, after in pairwise(sites)]
    return (*found, None)


def _predictor(
    modules: dict[str, nn.Module], here: Site | None, after: Site | None
) -> Predictor | None:
    if here is None or after is None:
        return None
    rescaled = rescaling(modules[here.norm], modules[after.norm])
    if rescaled is None:
        return None
    scale, shift = rescaled
    router = modules[after.router]
    # The order of linear logits survives a positive factor; nothing else does.
    if here.scaled and (after.scoring != Scoring() or "bias" in router or shift.any()):
        return None
    bias = None
    if after.bias is not None:
        owner, _, name = after.bias.rpartition(".")
        bias = modules[owner][name]
    return Predictor(
        router,
        bias,
        after.scoring,
        mx.array(scale),
        mx.array(shift) if shift.any() else None,
        after.top_k,
        after.n_experts,
    )


def rescaling(
    here: nn.Module, after: nn.Module
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
    """`scale`, `shift` with after(h) = here(h) * scale + shift for any h; None if there are none.

    The weights are taken from what the modules return, so that it does not matter whether a
    norm multiplies by its weight or by one plus it. Where `here` multiplies by zero, what `after`
    would see is lost and taken as zero.
    """
    weights = [norm.get("weight") for norm in (here, after)]
    shapes = [weight.shape for weight in weights if isinstance(weight, mx.array)]
    if len(shapes) < 2 or len(shapes[0]) != 1 or shapes[0] != shapes[1]:
        return None
    (width,), dtype = shapes[0], here["weight"].dtype
    # Mean 0 and mean square 1: what any norm leaves as it is.
    signs = np.where(np.arange(width) % 2 == 0, 1, -1).astype(np.float32)
    gain, offset = _linear(here, signs, dtype)
    gain_after, offset_after = _linear(after, signs, dtype)
    alive = gain != 0
    scale = np.where(alive, gain_after / np.where(alive, gain, 1), 0).astype(np.float32)
    shift = (offset_after - offset * scale).astype(np.float32)
    drawn = np.random.default_rng(0).standard_normal((4, width)) * 3 + 0.5
    ours = _call(here, drawn, dtype) * scale + shift
    theirs = np.where(alive, _call(after, drawn, dtype), ours)
    if np.abs(ours - theirs).max() > _CLOSE * max(float(np.abs(theirs).max()), 1e-6):
        return None
    return scale, shift


def _linear(
    norm: nn.Module, signs: npt.NDArray[np.float32], dtype: mx.Dtype
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    up, down = _call(norm, np.stack([signs, -signs]), dtype)
    return (up - down) / 2 * signs, (up + down) / 2


def _call(
    norm: nn.Module, rows: npt.NDArray[np.floating], dtype: mx.Dtype
) -> npt.NDArray[np.float32]:
    made: mx.array = norm(mx.array(rows.astype(np.float32)).astype(dtype))
    return np.array(made.astype(mx.float32))
