"""Whether a model's attention holds the scores of all its heads, queries and keys at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, KVCache, RotatingKVCache

from flashmoe.kernels.attention import replace_attention

# Of layers that attend, and of layers that have a state instead of keys.
ATTENDING = (KVCache, RotatingKVCache, ChunkedKVCache)


class ScoresProbe:
    """Notes what a pass over unevaluated arrays gives to mlx-lm's attention function."""

    def __init__(self) -> None:
        self._calls = 0
        self._per_head = False

    def watch(self, model: nn.Module) -> None:
        """Note what `model` does from now on."""
        replace_attention(model, self._attend)

    def are_never_held(self, caches: Sequence[Any]) -> bool:
        """Whether every layer that has keys in one of `caches` left its scores to the function.

        Scores that a layer computes itself come as a mask of every head; a layer that does not
        call the function, or whose cache holds more than keys and values, may hold anything.
        """
        attending = sum(type(cache) in ATTENDING for cache in caches)
        others = sum(type(cache) is not ArraysCache for cache in caches) - attending
        return self._calls == attending and not others and not self._per_head

    def _attend(
        self,
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        self._calls += 1
        if isinstance(mask, mx.array) and mask.ndim > 2 and mask.shape[-3] > 1:
            self._per_head = True
        y: mx.array = base.scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
        )
        return y
