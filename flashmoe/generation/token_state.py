"""A conversation's KV and state caches, and feeding tokens into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from flashmoe.base.clock import PhaseClock
from flashmoe.base.progress import Progress
from flashmoe.kernels.linear import left_lazy, output_layers
from flashmoe.streaming.experts import StreamedExperts
from flashmoe.streaming.watch import LayerWatch

# Told before tokens are fed: how many are known, how many come, and the bytes that caches have.
BeforeStep = Callable[[int, int, Callable[[], int]], None]


class _Stopped(Exception):
    """A forward pass was given up between two layers."""


class TokenState:
    """A model's KV and state caches, and exactly which token ids they have consumed.

    A forward pass that is cut short leaves the caches of some layers ahead of others; the state
    notices and starts anew the next time it is used.
    """

    def __init__(
        self,
        model: nn.Module,
        clock: PhaseClock,
        chunk: int,
        before_step: BeforeStep | None = None,
    ) -> None:
        self.ids: list[int] = []
        self._model = model
        self._clock = clock
        self._chunk = chunk
        self._before_step = before_step
        self._cache: list[Any] = make_prompt_cache(model)
        self._output_layers = output_layers(model)
        streamed = [m for m in model.modules() if isinstance(m, StreamedExperts)]
        self._n_layers = len(streamed)
        self._watch = streamed[0].watch if streamed else LayerWatch()
        self._torn = False
        # How many ids were fed when it was set, and what each cache held that cannot be trimmed.
        self._mark: tuple[int, list[dict[str, Any] | None]] | None = None

    def mark(self) -> None:
        """Keep copies of the caches that cannot be trimmed, as they are now, so that
        `rewind_to_prefix_of` can come back to here; those of the mark before are dropped."""
        kept = [None if _trims(cache) else _copied(vars(cache)) for cache in _flatten(self._cache)]
        mx.eval(list(_arrays(kept)))
        self._mark = (len(self.ids), kept)

    def rewind_to_prefix_of(self, ids: Sequence[int]) -> int:
        """Forget what is no prefix of `ids` (keeping at least its last token unfed); returns
        how many leading ids need not be fed again."""
        keep = 0
        for have, want in zip(self.ids, ids[:-1], strict=False):
            if have != want:
                break
            keep += 1
        surplus = len(self.ids) - keep
        if self._torn or (surplus and not (self._trim(surplus) or self._return(keep))):
            self._cache = make_prompt_cache(self._model)
            self.ids.clear()
            self._torn = False
            self._mark = None
            return 0
        if self._mark is not None and keep < self._mark[0]:
            self._mark = None
        del self.ids[keep:]
        return keep

    def feed(
        self,
        ids: Sequence[int],
        progress: Progress | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> mx.array | None:
        """Consume ids in chunks; `progress(done, total)` also counts a chunk's streamed layers,
        as parts of its tokens. Returns the logits [vocabulary] after the last one, or None
        when `should_stop` turned true, which is asked between streamed layers."""
        body, last = ids[:-1], ids[-1:]
        try:
            for first in range(0, len(body), self._chunk):
                if progress is not None:
                    progress(first, len(ids))
                if should_stop():
                    return None
                chunk = body[first : first + self._chunk]
                with self._by_layer(progress, should_stop, first, len(chunk), len(ids)):
                    self._forward(chunk, logits=False)
        except _Stopped:
            return None
        logits = self._forward(last, logits=True)
        if progress is not None:
            progress(len(ids), len(ids))
        return logits

    def held_bytes(self) -> int:
        """Memory of the caches."""
        arrays = (getattr(cache, "state", None) for cache in _flatten(self._cache))
        return sum(array.nbytes for array in _arrays(list(arrays)))

    def _forward(self, ids: Sequence[int], *, logits: bool) -> mx.array:
        if self._before_step is not None:
            self._before_step(len(self.ids), len(ids), self.held_bytes)
        self._torn = True
        # Before the last token only the caches matter: the LM head is never computed.
        with left_lazy(() if logits else self._output_layers):
            out: mx.array = self._model(mx.array([ids], mx.int32), cache=self._cache)[0, -1]
        state = [layer.state for layer in self._cache]
        with self._clock.during("computing"):
            mx.eval(state, out) if logits else mx.eval(state)
        self.ids.extend(ids)
        self._torn = False
        return out

    @contextmanager
    def _by_layer(
        self,
        progress: Progress | None,
        should_stop: Callable[[], bool],
        first: int,
        count: int,
        total: int,
    ) -> Iterator[None]:
        """Between the layers of a chunk of `count` tokens, say how far it is, and look whether to
        stop."""
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if progress is not None and done < self._n_layers:
                progress(first + count * done // self._n_layers, total)
            if should_stop():
                raise _Stopped

        self._watch.done = advance
        try:
            yield
        finally:
            self._watch.done = None

    def _trim(self, count: int) -> bool:
        if not all(map(_trims, _flatten(self._cache))) or not can_trim_prompt_cache(self._cache):
            return False
        return bool(trim_prompt_cache(self._cache, count) == count)

    def _return(self, keep: int) -> bool:
        """Go back to the mark, if that is where `keep` ids had been fed."""
        if self._mark is None or self._mark[0] != keep:
            return False
        pairs = list(zip(_flatten(self._cache), self._mark[1], strict=True))
        if not all(kept is not None or _trims(cache) for cache, kept in pairs):
            return False
        for cache, kept in pairs:
            if kept is None:
                cache.trim(len(self.ids) - keep)
            else:
                # Copies once more: caches are written to in place.
                vars(cache).update(_copied(kept))
        mx.eval([layer.state for layer in self._cache])
        return True


def _trims(cache: Any) -> bool:
    """Whether a cache can forget its last tokens; not one that has dropped tokens from its
    front, which cannot go back to where they count."""
    return bool(cache.is_trimmable() and not getattr(cache, "start_position", 0))


def _copied(tree: Any) -> Any:
    if isinstance(tree, mx.array):
        return mx.array(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(_copied(item) for item in tree)
    if isinstance(tree, dict):
        return {name: _copied(item) for name, item in tree.items()}
    return tree


def _flatten(caches: Sequence[Any]) -> Iterator[Any]:
    for cache in caches:
        inner = getattr(cache, "caches", None)
        if inner is None:
            yield cache
        else:
            yield from _flatten(inner)


def _arrays(tree: Any) -> Iterator[mx.array]:
    if isinstance(tree, mx.array):
        yield tree
    elif isinstance(tree, list | tuple | dict):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _arrays(item)
