"""From an open store to an mlx-lm model whose routed experts stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from flashmoe.bank.bank import LayerBank
from flashmoe.bank.stats import Stats
from flashmoe.base.clock import PhaseClock
from flashmoe.base.errors import StoreError
from flashmoe.checkpoint.architecture import (
    build_resident,
    expert_modules,
    extra_children,
    kind_of,
    replace_modules,
)
from flashmoe.checkpoint.config import Config
from flashmoe.io.reader import Reader
from flashmoe.kernels.attention import attend, replace_attention
from flashmoe.kernels.contract import ExpertForward, ExpertKernel, ExpertSpec, ProjectionPacking
from flashmoe.kernels.linear import native_twin
from flashmoe.store.layout import LayerLayout, RecordLayout
from flashmoe.store.reader import Store
from flashmoe.streaming.experts import StreamedExperts
from flashmoe.streaming.prefetcher import Predict, Prefetcher, Trial
from flashmoe.streaming.prefill import ExpertPrefill, Staging


@dataclass(frozen=True)
class StreamingModel:
    """The mlx-lm module, and its streamed layers with their banks in layer order."""

    module: nn.Module
    layers: tuple[StreamedExperts, ...]
    banks: tuple[LayerBank, ...]
    staging: tuple[Staging, ...]

    @property
    def can_prefetch(self) -> bool:
        """Whether predictions about any layer's experts would be of use."""
        return any(
            layer.reads_apart and bank.can_prefetch
            for layer, bank in zip(self.layers, self.banks[1:], strict=False)
        )

    def prefetch_by(self, predictions: Sequence[Predict | None]) -> None:
        """Have layers prefetch what they predict of the next one, where its bank has room."""
        trial = Trial(disturbed=self._warm_starting)
        for layer, predicted, bank in zip(self.layers, predictions, self.banks[1:], strict=False):
            if predicted is not None and layer.reads_apart and bank.can_prefetch:
                layer.prefetcher = Prefetcher(predicted, bank, trial)

    def _warm_starting(self) -> bool:
        return any(bank.warm_starting for bank in self.banks)

    def slots(self) -> list[int]:
        """How many slots each layer's bank has."""
        return [bank.memory.n_slots for bank in self.banks]

    def uses(self) -> list[npt.NDArray[np.int64]]:
        """How often single tokens used each expert of each layer."""
        return [layer.uses for layer in self.layers]

    @property
    def resizes_in_place(self) -> bool:
        """Whether banks change their size without new arrays, which makes that cheap."""
        return all(bank.memory.reserves for bank in self.banks)

    def resize(self, slots: Sequence[int]) -> None:
        """Have so many slots in each layer's bank; those that shrink do so first.

        Raises what `LayerBank.resize` raises. Not while the module is called.
        """
        resized = list(zip(self.layers, slots, strict=True))
        for layer, n_slots in sorted(
            resized, key=lambda pair: pair[1] - pair[0].bank.memory.n_slots
        ):
            layer.resize(n_slots)

    def warm_start(self, experts: Sequence[Sequence[int]]) -> None:
        """Read each bank's experts, the most valuable first, while nothing else is read; without
        any, nothing."""
        for bank, wanted in zip(self.banks, experts, strict=False):
            bank.warm_start(wanted)

    def stop_prefetch(self) -> None:
        """Give up what nobody has demanded."""
        for bank in self.banks:
            bank.stop_prefetch()

    def close(self) -> None:
        """Give the banks' memory back; the module can no longer be called."""
        for layer in self.layers:
            layer.close()
        for staging in self.staging:
            staging.release()


def build_skeleton(store: Store, config: Config) -> nn.Module:
    """The store's model without any weights, its expert modules still mlx-lm's.

    Raises StoreError when the model's expert modules are not the store's layers.
    """
    model = build_resident(config, store.manifest.quantization)
    found = {path: kind_of(module) for path, module in expert_modules(model).items()}
    stored = {layer.layout.path: layer.layout.kind for layer in store.manifest.layers}
    if found != stored:
        odd = sorted(found.items() ^ stored.items())[0][0]
        raise StoreError(
            f"{store.path}: the layer {odd} of the store and of mlx-lm's "
            f"{store.manifest.model_type} differ; repack the model"
        )
    return model


def load_resident(model: nn.Module, store: Store, widen: bool) -> None:
    """Read the resident weights into `model`, 16-bit floats widened to float32 on request.

    One tensor at a time, so the peak is the weights plus one tensor. Raises StoreError when
    the store's tensors are not the model's.
    """
    weights: list[tuple[str, mx.array]] = []
    for shard in store.manifest.resident:
        lazy: Any = mx.load(str(store.file(shard.file)))
        for tensor in shard.tensors:
            array = lazy.pop(tensor.name)
            if widen and array.dtype in (mx.bfloat16, mx.float16):
                array = array.astype(mx.float32)
            try:
                mx.eval(array)
            except RuntimeError as error:
                raise StoreError(f"{store.file(shard.file)} cannot be read: {error}") from error
            weights.append((tensor.name, array))
    try:
        model.load_weights(weights, strict=True)
    except ValueError as error:
        line = str(error).strip().splitlines()[0]
        raise StoreError(f"{store.path} does not hold this model's tensors: {line}") from error
    model.eval()


def use_native_linears(model: nn.Module, clock: PhaseClock | None = None) -> None:
    """Put native products into the resident linear layers that the library covers; `clock` is
    told of their time."""
    twins = {path: native_twin(module, clock) for path, module in model.named_modules()}
    replace_modules(model, {path: twin for path, twin in twins.items() if twin is not None})


def use_native_attention(model: nn.Module, clock: PhaseClock | None = None) -> None:
    """Have the attention modules of `model` attend through the library where it covers that;
    `clock` is told of its time."""
    replace_attention(model, partial(attend, clock=clock))


def stream_experts(
    model: nn.Module,
    store: Store,
    *,
    slots: Sequence[int],
    group_records: int,
    reader: Reader,
    kernel: ExpertKernel,
    prompt_kernel: ExpertKernel,
    stats: Stats,
    widen: bool,
    prefill_reader: Reader | None = None,
) -> StreamingModel:
    """Replace every routed-expert module of `model` with one over a bank of its own.

    With `group_records`, prompts go through staging groups of that size, which layers of one
    record layout share and `prefill_reader` (by default `reader`) reads into; without any, they
    go through the banks.
    """
    modules = expert_modules(model)
    banks = []
    stagings: dict[RecordLayout, Staging] = {}
    streamed: dict[str, StreamedExperts] = {}
    for layer, n_slots in zip(store.manifest.layers, slots, strict=True):
        layout = layer.layout
        module = modules[layout.path]
        bank = LayerBank(
            store,
            layout,
            reader,
            stats,
            n_slots=n_slots,
            widen=widen,
            most_slots=layout.n_experts,
        )
        spec = _spec(layout, module)
        bind = partial(_bind, kernel, prompt_kernel, spec)
        prefill = None
        if group_records:
            if layout.record not in stagings:
                stagings[layout.record] = Staging(layout.record, group_records, widen)
            staging = stagings[layout.record]
            forwards = [prompt_kernel(group.weights, spec) for group in staging.groups]
            path = store.file(layout.file)
            prefill = ExpertPrefill(
                path, layout, prefill_reader or reader, stats, bank, staging, forwards
            )
        children = extra_children(module)
        streamed[layout.path] = StreamedExperts(bank, bind, stats, children, prefill)
        banks.append(bank)
    replace_modules(model, streamed)
    return StreamingModel(model, tuple(streamed.values()), tuple(banks), tuple(stagings.values()))


def _bind(
    kernel: ExpertKernel,
    prompt_kernel: ExpertKernel,
    spec: ExpertSpec,
    weights: Mapping[str, mx.array],
) -> tuple[ExpertForward, ExpertForward]:
    return kernel(weights, spec), prompt_kernel(weights, spec)


def _spec(layout: LayerLayout, module: nn.Module) -> ExpertSpec:
    packing = {
        name: ProjectionPacking(q.bits, q.group_size, q.mode)
        for name, q in layout.projections.items()
    }
    return ExpertSpec(layout.kind, module.activation, packing)
