"""The module that takes the place of mlx-lm's SwitchGLU and SwitchMLP."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from flashmoe.kernels.contract import ExpertForward
from flashmoe.streaming.bank import LayerBank
from flashmoe.streaming.forecast import Foresight
from flashmoe.streaming.parts import ALL_PARTS, Parts
from flashmoe.streaming.sweep import Sweep
from flashmoe.streaming.telemetry import Stats

# Smaller records are there before it pays to compute without them.
APART_BYTES = 256 * 1024


class StreamedExperts(nn.Module):
    """Routed experts whose weights are in a bank; same call and result as the module replaced.

    `x` [..., d_in], `indices` [..., k] -> [..., k, d_out] in x's dtype. `children` are the
    resident parts of the replaced module (activation, norms), kept under their names. What
    needs more experts than one token does goes through `sweep`, or without one through the bank
    with `prompt_forward`. `observer`, when set, is called with each call's routed
    experts [..., k]. `parts` says what of all this is on.
    """

    def __init__(
        self,
        bank: LayerBank,
        forward: ExpertForward,
        prompt_forward: ExpertForward,
        stats: Stats,
        children: Mapping[str, Any],
        sweep: Sweep | None = None,
        parts: Parts = ALL_PARTS,
    ) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self._bank = bank
        self._forward: ExpertForward | None = forward
        self._prompt_forward: ExpertForward | None = prompt_forward
        self._stats = stats
        self._sweep = sweep
        self._parts = parts
        # Set where the next layer's experts can be guessed.
        self.foresight: Foresight | None = None
        self.observer: Callable[[npt.NDArray[Any]], None] | None = None

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        y = self._call(x, indices)
        if self._stats.after_layer is not None:
            self._stats.after_layer()
        return y

    def _call(self, x: mx.array, indices: mx.array) -> mx.array:
        one_token = indices.size == indices.shape[-1]
        guess = self.foresight.guess(x) if self.foresight is not None and one_token else None
        started = time.perf_counter()
        # The readback: once these are here, everything this layer's routing depends on has run.
        if guess is not None:
            mx.eval(indices, guess)
        experts = np.array(indices)
        self._stats.seconds.computing += time.perf_counter() - started
        if self.observer is not None:
            self.observer(experts)
        distinct = np.unique(experts)
        if len(distinct) > self._bank.group:
            if self._sweep is not None:
                return self._sweep(x, experts)
            return self._run_grouped(x, experts, distinct)
        if one_token and not self._parts.routed:
            self._bank.read_past(distinct.tolist())
        if one_token and self.reads_apart:
            y = self._run_overlapped(x, experts, guess)
        else:
            y = self._run(x, experts, distinct)
        self._bank.uses(y)
        return y

    @property
    def reads_apart(self) -> bool:
        """Whether computing and reading overlap: records are large enough, and it is not off."""
        return self._parts.overlap and self._bank.record_bytes >= APART_BYTES

    def close(self) -> None:
        """Give the bank's memory back; calls raise FlashMoEError afterwards."""
        self._forward = None
        self._prompt_forward = None
        self._sweep = None
        self._bank.close()

    def _run_overlapped(
        self, x: mx.array, experts: npt.NDArray[Any], guess: mx.array | None
    ) -> mx.array:
        """One token: experts in the bank compute while the others are read, and these as they
        land. In any order, because a kernel's results do not depend on which slots are in a call.
        Behind them, what the next layer may need is read.
        """
        flat = experts.reshape(-1)
        with self._bank.request(flat.tolist(), apart=True) as arrivals:
            if guess is not None and self.foresight is not None:
                self.foresight.read_ahead(guess)
            ready = self._bank.resident(flat.tolist())
            if len(ready) == len(flat):
                return self._compute(x, self._bank.slots_of(experts))
            row = x.reshape(1, x.shape[-1])
            places, parts = [], []
            while ready or (ready := self._bank.wait(arrivals)):
                taken = np.flatnonzero(np.isin(flat, ready))
                places.append(taken)
                parts.append(self._compute(row, self._bank.slots_of(flat[None, taken]))[0])
                # A lazy kernel starts now, while the reads go on.
                mx.async_eval(parts[-1])  # type: ignore[no-untyped-call]
                ready = []
        order = np.argsort(np.concatenate(places))
        y = mx.concatenate(parts)[mx.array(order)]
        return y.reshape(*experts.shape, y.shape[-1])

    def _run(self, x: mx.array, experts: npt.NDArray[Any], distinct: npt.NDArray[Any]) -> mx.array:
        table = self._bank.acquire(distinct.tolist())
        return self._compute(x, table[experts])

    def _compute(
        self, x: mx.array, slots: npt.NDArray[np.int32], *, prompt: bool = False
    ) -> mx.array:
        forward = self._prompt_forward if prompt else self._forward
        assert forward is not None  # a closed bank gives no slots
        started = time.perf_counter()
        y = forward(x, slots)
        self._stats.seconds.experts += time.perf_counter() - started
        return y

    def _run_grouped(
        self, x: mx.array, experts: npt.NDArray[Any], distinct: npt.NDArray[Any]
    ) -> mx.array:
        """Walk the needed experts in disk order, one token's worth at a time.

        Which rows share a kernel call depends on the routing alone, never on the bank.
        """
        rows = x.reshape(-1, x.shape[-1])
        flat = experts.reshape(-1)
        order = np.argsort(flat, kind="stable")
        token_of = order // experts.shape[-1]
        parts = []
        for first in range(0, len(distinct), self._bank.group):
            group = distinct[first : first + self._bank.group]
            begin, end = np.searchsorted(flat[order], [group[0], group[-1] + 1])
            table = self._bank.acquire(group.tolist())
            slots = table[flat[order[begin:end], None]]
            y = self._compute(rows[mx.array(token_of[begin:end])], slots, prompt=True)
            started = time.perf_counter()
            mx.eval(y)
            self._stats.seconds.computing += time.perf_counter() - started
            parts.append(y.squeeze(-2))
        restore = np.empty_like(order)
        restore[order] = np.arange(len(order))
        y = mx.concatenate(parts)[mx.array(restore)]
        return y.reshape(*experts.shape, y.shape[-1])
