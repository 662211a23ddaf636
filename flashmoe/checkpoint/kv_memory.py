"""How much memory mlx-lm's KV and state caches take at a given number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache

# KV caches grow in steps of this many tokens along axis 2 of [batch, heads, tokens, width].
STEP_TOKENS = KVCache.step
TOKEN_AXIS = 2


def cache_bytes(caches: Sequence[Any], n_tokens: int, *, filled: bool = False) -> int:
    """Bytes that caches probed with one token will hold after `n_tokens` tokens.

    They grow by whole steps; `filled` counts what tokens have filled of that. Recurrent states
    keep their size, sliding windows stop at theirs, and everything else is taken to grow with
    the tokens, which is an upper bound for kinds not known here.
    """
    return sum(_layer_bytes(cache, n_tokens, filled) for cache in caches)


def _layer_bytes(cache: Any, n_tokens: int, filled: bool) -> int:
    inner = getattr(cache, "caches", None)
    if inner is not None:
        return cache_bytes(inner, n_tokens, filled=filled)
    arrays = list(_arrays(cache.state))
    if isinstance(cache, ArraysCache):
        return sum(array.nbytes for array in arrays)
    tokens = min(n_tokens, getattr(cache, "max_size", None) or n_tokens)
    if not filled:
        tokens = -(-tokens // STEP_TOKENS) * STEP_TOKENS
    total = 0
    for array in arrays:
        allocated = max(array.shape[TOKEN_AXIS] if array.ndim > TOKEN_AXIS else 1, 1)
        if filled:
            total += array.nbytes * tokens // allocated
        else:
            total += array.nbytes * -(-tokens // allocated)
    return total


def _arrays(tree: Any) -> Iterator[mx.array]:
    if isinstance(tree, mx.array):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _arrays(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _arrays(item)
