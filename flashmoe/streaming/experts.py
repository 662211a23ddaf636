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
from flashmoe.streaming.telemetry import Stats


class StreamedExperts(nn.Module):
    """Routed experts whose weights are in a bank; same call and result as the module replaced.

    `x` [..., d_in], `indices` [..., k] -> [..., k, d_out] in x's dtype. `children` are the
    resident parts of the replaced module (activation, norms), kept under their names.
    `observer`, when set, is called with each call's routed experts [..., k].
    """

    def __init__(
        self,
        bank: LayerBank,
        forward: ExpertForward,
        stats: Stats,
        children: Mapping[str, Any],
    ) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self._bank = bank
        self._forward: ExpertForward | None = forward
        self._stats = stats
        self.observer: Callable[[npt.NDArray[Any]], None] | None = None

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        started = time.perf_counter()
        # The readback: once these are here, everything this layer's routing depends on has run.
        experts = np.array(indices)
        self._stats.seconds.computing += time.perf_counter() - started
        if self.observer is not None:
            self.observer(experts)
        distinct = np.unique(experts)
        if len(distinct) <= self._bank.group:
            y = self._run(x, experts, distinct)
            self._bank.uses(y)
            return y
        return self._run_grouped(x, experts, distinct)

    def close(self) -> None:
        """Give the bank's memory back; calls raise FlashMoEError afterwards."""
        self._forward = None
        self._bank.close()

    def _run(self, x: mx.array, experts: npt.NDArray[Any], distinct: npt.NDArray[Any]) -> mx.array:
        table = self._bank.acquire(distinct.tolist())
        assert self._forward is not None  # acquire raises once the bank is closed
        return self._forward(x, table[experts])

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
            y = self._run(rows[mx.array(token_of[begin:end])], flat[order[begin:end], None], group)
            started = time.perf_counter()
            mx.eval(y)
            self._stats.seconds.computing += time.perf_counter() - started
            parts.append(y.squeeze(-2))
        restore = np.empty_like(order)
        restore[order] = np.arange(len(order))
        y = mx.concatenate(parts)[mx.array(restore)]
        return y.reshape(*experts.shape, y.shape[-1])
