"""How much memory mlx-lm's KV and state caches take at a given number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache

# KV caches grow in steps of this many tokens along axis 2 of [batch, heads, tokens, width].
STEP_TOKENS: int = KVCache.step
TOKEN_AXIS = 2


@dataclass(frozen=True)
class CacheArray:
    """One array of a layer's cache: `nbytes` for `tokens` tokens, of which it keeps at most
    `window` (None: all). A recurrent state is of no tokens (0) and keeps its size."""

    nbytes: int
    tokens: int
    window: int | None = None

    def bytes_at(self, n_tokens: int, *, filled: bool = False) -> int:
        """Bytes after `n_tokens` tokens: caches grow by whole steps, `filled` counts what tokens
        have filled of them."""
        if not self.tokens:
            return self.nbytes
        kept = min(n_tokens, self.window or n_tokens)
        if filled:
            return self.nbytes * kept // self.tokens
        steps = -(-kept // STEP_TOKENS) * STEP_TOKENS
        return self.nbytes * -(-steps // self.tokens)


# The arrays of each layer's cache.
CacheSizes = tuple[tuple[CacheArray, ...], ...]


def cache_sizes(caches: Sequence[Any]) -> CacheSizes:
    """The sizes of mlx-lm's caches, one for each layer, that were probed with one token.

    Kinds that are not known here are taken to grow with the tokens, which is an upper bound.
    """
    return tuple(tuple(_arrays_of(cache)) for cache in caches)


def cache_bytes(sizes: CacheSizes, n_tokens: int, *, filled: bool = False) -> int:
    """Bytes of all layers' caches after `n_tokens` tokens; `filled` as in `CacheArray`."""
    return sum(a.bytes_at(n_tokens, filled=filled) for layer in sizes for a in layer)


def _arrays_of(cache: Any) -> Iterator[CacheArray]:
    inner = getattr(cache, "caches", None)
    if inner is not None:
        for part in inner:
            yield from _arrays_of(part)
        return
    window = getattr(cache, "max_size", None) or None
    for array in _arrays(cache.state):
        if isinstance(cache, ArraysCache):
            yield CacheArray(array.nbytes, 0)
        else:
            allocated = array.shape[TOKEN_AXIS] if array.ndim > TOKEN_AXIS else 1
            yield CacheArray(array.nbytes, max(allocated, 1), window)


def _arrays(tree: Any) -> Iterator[mx.array]:
    if isinstance(tree, mx.array):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _arrays(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _arrays(item)
