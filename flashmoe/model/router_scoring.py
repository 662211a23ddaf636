"""How a router turns logits into the order that its top-k is taken from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# Float32 holds this beside scores of any family without losing the order within a group.
BELOW_ALL = 1e4
# Published models have 8 groups of experts at most.
_MOST_GROUPS = 16


def _softmax(logits: mx.array) -> mx.array:
    return mx.softmax(logits, axis=-1, precise=True)


def _sqrt_softplus(logits: mx.array) -> mx.array:
    return mx.sqrt(nn.softplus(logits))


def _identity(logits: mx.array) -> mx.array:
    return logits


_FUNCTIONS: tuple[Callable[[mx.array], mx.array], ...] = (
    mx.sigmoid,
    _softmax,
    _sqrt_softplus,
    _identity,
)
# Of these, a score depends on one logit alone.
ELEMENTWISE = (mx.sigmoid, _sqrt_softplus)


@dataclass(frozen=True)
class Groups:
    """Selection from the `kept` of `count` equal groups of experts that score highest, a group's
    score being the sum of its `best` highest scores."""

    count: int
    kept: int
    best: int


@dataclass(frozen=True)
class Scoring:
    """Selection scores: a function of the logits, plus a bias per expert if the router has one,
    experts outside the kept groups last."""

    function: Callable[[mx.array], mx.array] = _identity
    biased: bool = False
    groups: Groups | None = None

    def __call__(self, logits: mx.array, bias: mx.array | None) -> mx.array:
        """float32 scores [..., n_experts] of logits of that shape."""
        scores = self.function(logits.astype(mx.float32))
        if self.biased and bias is not None:
            scores = scores + bias.astype(mx.float32)
        return scores if self.groups is None else _limited(scores, self.groups)


def _limited(scores: mx.array, groups: Groups) -> mx.array:
    split = mx.unflatten(scores, -1, (groups.count, -1))
    totals = mx.topk(split, groups.best, axis=-1).sum(axis=-1, keepdims=True)
    least = mx.topk(totals, groups.kept, axis=-2).min(axis=-2, keepdims=True)
    limited: Any = mx.where(totals < least, split - BELOW_ALL, split)
    return mx.flatten(limited, -2, -1)


def plain_scorings(biased: bool) -> Iterator[Scoring]:
    """Ways of scoring all experts alike. Without a bias every function gives one order."""
    for function in _FUNCTIONS if biased else (_identity,):
        yield Scoring(function, biased)


def grouped_scorings(n_experts: int, biased: bool) -> Iterator[Scoring]:
    """Ways of scoring that prefer groups of experts."""
    for count in range(2, min(n_experts // 2, _MOST_GROUPS) + 1):
        if n_experts % count:
            continue
        for kept, best, function in product(range(1, count), (2, 1), _FUNCTIONS):
            yield Scoring(function, biased, Groups(count, kept, best))


def top(scores: mx.array, count: int) -> mx.array:
    """int32 [..., count], the places of the highest scores, highest first."""
    return mx.argsort(-scores, axis=-1)[..., :count].astype(mx.int32)


def logits_of(router: nn.Module, x: mx.array) -> mx.array:
    """[..., n_experts] of x [..., d]: what a linear router returns, or, of a module that returns
    something else, the product with its weight in float32."""
    if isinstance(router, (nn.Linear, nn.QuantizedLinear)):
        logits: mx.array = router(x)
        return logits
    weight: mx.array = router["weight"]
    return x.astype(mx.float32) @ weight.astype(mx.float32).T
