"""Routing that prefers experts in memory where the router's scores are close. It is lossy.

The margin is in router logits. Of a single token's top-k, an expert that is not in the bank gives
way to the one of highest selection score that is, and is not in the top-k, if its logit is at
most the margin lower. The weakest of the top-k are tried first.

Families turn logits into weights in ways of their own, which are left to them: the router gives
the chosen experts their logits as they are, and all others one logit that is below them and keeps
the sum of exponentials, hence every softmax, as it was. Where no such logit exists, the weakest
replacements are dropped until one does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from flashmoe.bank.bank import LayerBank
from flashmoe.base.errors import OptionError
from flashmoe.checkpoint.architecture import replace_modules
from flashmoe.checkpoint.config import Config
from flashmoe.model.load import StreamingModel
from flashmoe.model.router_scoring import BELOW_ALL, ELEMENTWISE, Scoring, logits_of
from flashmoe.model.routing_sites import Site, find_sites

# Far below any logit: what an elementwise score of it is, no selection bias makes up for.
_NEVER = -1e4

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Steering:
    """One router's rule: its scoring, selection bias, top-k and margin."""

    scoring: Scoring
    bias: mx.array | None
    top_k: int
    margin: float

    def __call__(self, logits: Floats, resident: Bools) -> Floats | None:
        """The logits [n_experts] that lead to the preferred experts, or None for those given.

        `resident` [n_experts] says which experts are in memory.
        """
        scores = self._scores(logits)
        order = np.argsort(-scores, kind="stable")
        chosen, others = order[: self.top_k], order[self.top_k :]
        # Where only some groups of experts are chosen from, the others stay out.
        near = scores > scores[chosen[-1]] - BELOW_ALL / 2
        candidates = [expert for expert in others.tolist() if resident[expert] and near[expert]]
        swaps: list[tuple[int, int]] = []
        for expert in chosen[::-1].tolist():
            if resident[expert] or not candidates:
                continue
            if logits[expert] - logits[candidates[0]] <= self.margin:
                swaps.append((expert, candidates.pop(0)))
        while swaps:
            gone, come = map(set, zip(*swaps, strict=True))
            steered = self._lead_to(logits, (set(chosen.tolist()) - gone) | come)
            if steered is not None:
                return steered
            swaps.pop()
        return None

    def _lead_to(self, logits: Floats, wanted: set[int]) -> Floats | None:
        """Logits for which the router chooses `wanted`, with weights as they would have."""
        out = np.ones(len(logits), bool)
        out[list(wanted)] = False
        left = logits[out].astype(np.float64)
        highest = left.max()
        levels = [highest + np.log(np.mean(np.exp(left - highest)))]
        # Without a selection bias, several functions may explain one order.
        if self.scoring.biased and self.scoring.function in ELEMENTWISE:
            levels.append(_NEVER)
        for level in levels:
            steered = np.where(out, np.float32(level), logits).astype(np.float32)
            scores = self._scores(steered)
            if scores[~out].min() > scores[out].max():
                return steered
        return None

    def _scores(self, logits: Floats) -> Floats:
        scores: Floats = np.array(self.scoring(mx.array(logits[None]), self.bias))[0]
        return scores


class SteeredRouter(nn.Module):
    """In the place of a linear router: its logits, for a single token those that `steering` gives.

    What the bank holds is looked at in each call, which evaluates the logits.
    """

    def __init__(self, router: nn.Module, steering: Steering, bank: LayerBank) -> None:
        super().__init__()
        self._router = router
        self._steering = steering
        self._bank = bank

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        steered = self._steered(x)
        return self._router(x, *args, **kwargs) if steered is None else steered

    def _steered(self, x: mx.array) -> mx.array | None:
        """The logits that a single token's are replaced with, shaped and typed as they are."""
        if x.size != x.shape[-1]:
            return None
        logits = logits_of(self._router, x)
        host = np.array(logits.astype(mx.float32)).reshape(-1)
        steered = self._steering(host, self._bank.residency())
        if steered is None:
            return None
        return mx.array(steered).reshape(logits.shape).astype(logits.dtype)


class SteeredGate(SteeredRouter):
    """In the place of a router that multiplies by its weight and goes on to choose: the same with
    the identity as its weight, given logits."""

    def __init__(self, router: nn.Module, steering: Steering, bank: LayerBank) -> None:
        super().__init__(router, steering, bank)
        self._chooser = copy.copy(router)
        self._chooser["weight"] = mx.eye(router["weight"].shape[0], dtype=router["weight"].dtype)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        steered = self._steered(x)
        if steered is None:
            return self._router(x, *args, **kwargs)
        return self._chooser(steered.astype(x.dtype), *args, **kwargs)


def find_steerable(config: Config) -> tuple[Site, ...]:
    """The routers of a model in the order of its layers.

    Raises OptionError naming the family when one is not found.
    """
    sites: list[Site] = []
    for path, site in find_sites(config).items():
        if site is None or path.startswith(f"{site.router}."):
            raise OptionError(
                f"the routers of {config['model_type']} models are not found where they could be "
                "biased; leave --route-bias out"
            )
        sites.append(site)
    return tuple(sites)


def prefer_resident(streaming: StreamingModel, sites: Sequence[Site], margin: float) -> None:
    """Have the routers at `sites`, one per layer, prefer experts in memory within `margin` router
    logits."""
    model = streaming.module
    modules = dict(model.named_modules())
    routers: dict[str, nn.Module] = {}
    for site, bank in zip(sites, streaming.banks, strict=True):
        router = modules[site.router]
        linear = isinstance(router, (nn.Linear, nn.QuantizedLinear))
        kind = SteeredRouter if linear else SteeredGate
        bias = None if site.bias is None else _lookup(modules, site.bias)
        steering = Steering(site.scoring, bias, site.top_k, margin)
        routers[site.router] = kind(router, steering, bank)
    replace_modules(model, routers)


def _lookup(modules: dict[str, nn.Module], name: str) -> mx.array:
    owner, _, last = name.rpartition(".")
    array: mx.array = modules[owner][last]
    return array
