"""The module that takes the place of mlx-lm's SwitchGLU and SwitchMLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from flashmoe.bank.arrivals import reads_apart
from flashmoe.bank.bank import LayerBank
from flashmoe.bank.meter import Meter
from flashmoe.base.errors import FlashMoEError
from flashmoe.kernels.contract import ExpertForward
from flashmoe.streaming.prefetcher import Prefetcher
from flashmoe.streaming.prefill import ExpertPrefill
from flashmoe.streaming.watch import LayerWatch

# A bank's arrays as the kernels for single tokens and for prompts see them.
Bind = Callable[[Mapping[str, mx.array]], tuple[ExpertForward, ExpertForward]]


class StreamedExperts(nn.Module):
    """Routed experts whose weights are in a bank; same call and result as the module replaced.

    `x` [..., d_in], `indices` [..., k] -> [..., k, d_out] in x's dtype. `children` are the
    resident parts of the replaced module (activation, norms), kept under their names. What
    needs more experts than one token does goes through `prefill`, or without one through the bank,
    and meets the second of the kernels that `bind` gives. `prefetcher` reads what the next layer
    may need. `watch` is told of what this layer, the one of that `number`, does.
    """

    def __init__(
        self,
        bank: LayerBank,
        bind: Bind,
        meter: Meter,
        children: Mapping[str, Any],
        prefill: ExpertPrefill | None = None,
        prefetcher: Prefetcher | None = None,
        watch: LayerWatch | None = None,
        number: int = 0,
    ) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self._bank = bank
        self._bind = bind
        self._forwards: tuple[ExpertForward, ExpertForward] | None = bind(bank.memory.weights)
        self._clock = meter.clock
        self._prefill = prefill
        # How often single tokens used each expert.
        self._uses = np.zeros(bank.n_records, np.int64)
        self._prefetcher = prefetcher
        self.watch = watch or LayerWatch()
        self._number = number

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        y = self._call(x, indices)
        if self.watch.done is not None:
            self.watch.done()
        return y

    def _call(self, x: mx.array, indices: mx.array) -> mx.array:
        one_token = indices.size == indices.shape[-1]
        prefetcher = self._prefetcher
        predicted = prefetcher.predict(x) if prefetcher is not None and one_token else None
        # The readback: once these are here, everything this layer's routing depends on has run.
        with self._clock.during("computing"):
            if predicted is not None:
                mx.eval(indices, predicted)
            experts = np.array(indices)
        if self.watch.routed is not None:
            self.watch.routed(self._number, experts)
        distinct = np.unique(experts)
        if len(distinct) > self._bank.step_records:
            if self._prefill is not None:
                return self._prefill(x, experts, self._forward(prompt=True))
            return self._run_grouped(x, experts, distinct)
        if one_token:
            self._uses[distinct] += 1
        if one_token and reads_apart(self._bank.record_bytes):
            y = self._run_overlapped(x, experts, predicted)
        else:
            y = self._run(x, experts, distinct)
        self._bank.uses(y)
        return y

    @property
    def bank(self) -> LayerBank:
        """Where the experts are."""
        return self._bank

    @property
    def uses(self) -> npt.NDArray[np.int64]:
        """How often single tokens used each expert [n_experts]; the caller may make them less."""
        return self._uses

    def resize(self, n_slots: int) -> None:
        """Have a bank of so many slots; raises what `LayerBank.resize` does. Not while called."""
        in_place = self._bank.memory.resizes_in_place(n_slots)
        if not in_place:
            # Kernels hold the arrays, whose memory would stay taken.
            self._forwards = None
        try:
            self._bank.resize(n_slots)
        finally:
            if not in_place:
                self._forwards = self._bind(self._bank.memory.weights)

    def close(self) -> None:
        """Give the bank's memory back; calls raise FlashMoEError afterwards."""
        self._forwards = None
        self._prefill = None
        self._bank.close()

    def _forward(self, *, prompt: bool) -> ExpertForward:
        if self._forwards is None:
            raise FlashMoEError("the model is closed; load it again with from_pretrained")
        return self._forwards[prompt]

    def _run_overlapped(
        self, x: mx.array, experts: npt.NDArray[Any], predicted: mx.array | None
    ) -> mx.array:
        """One token: experts in the bank compute while the others are read, and these as they
        land. In any order, because a kernel's results do not depend on which slots are in a call.
        Behind them, what the next layer may need is read.
        """
        flat: list[int] = experts.reshape(-1).tolist()
        with self._bank.request(flat, apart=True) as arrivals:
            if predicted is not None and self._prefetcher is not None:
                self._prefetcher.prefetch(predicted)
            ready = self._bank.resident(flat)
            if len(ready) == len(flat):
                return self._compute(x, self._bank.slots_of(experts))
            row = x.reshape(1, x.shape[-1])
            order: list[int] = []
            parts = []
            while ready or (ready := self._bank.wait(arrivals)):
                order += ready
                parts.append(self._compute(row, self._bank.slots_of(np.array([ready]))))
                # A lazy kernel starts now, while the reads go on.
                mx.async_eval(parts[-1])  # type: ignore[no-untyped-call]
                ready = []
        y = mx.concatenate(parts, axis=1)[0][mx.array([order.index(expert) for expert in flat])]
        return y.reshape(*experts.shape, y.shape[-1])

    def _run(self, x: mx.array, experts: npt.NDArray[Any], distinct: npt.NDArray[Any]) -> mx.array:
        table = self._bank.acquire(distinct.tolist())
        return self._compute(x, table[experts])

    def _compute(
        self, x: mx.array, slots: npt.NDArray[np.int32], *, prompt: bool = False
    ) -> mx.array:
        forward = self._forward(prompt=prompt)
        with self._clock.during("experts"):
            return forward(x, slots)

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
        for first in range(0, len(distinct), self._bank.step_records):
            group = distinct[first : first + self._bank.step_records]
            begin, end = np.searchsorted(flat[order], [group[0], group[-1] + 1])
            table = self._bank.acquire(group.tolist())
            slots = table[flat[order[begin:end], None]]
            y = self._compute(rows[mx.array(token_of[begin:end])], slots, prompt=True)
            with self._clock.during("experts"):
                mx.eval(y)
            parts.append(y.squeeze(-2))
        restore = np.empty_like(order)
        restore[order] = np.arange(len(order))
        y = mx.concatenate(parts)[mx.array(restore)]
        return y.reshape(*experts.shape, y.shape[-1])
