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

from flashmoe.bank.arrivals import reads_apart
from flashmoe.bank.bank import LayerBank
from flashmoe.bank.meter import Meter
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
from flashmoe.streaming.watch import LayerWatch


@dataclass(frozen=True)
class StreamingModel:
    """The mlx-lm module, and its streamed layers with their banks in layer order."""

    module: nn.Module
    layers: tuple[StreamedExperts, ...]
    banks: tuple[LayerBank, ...]
    staging: tuple[Staging, ...]
    watch: LayerWatch

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


@dataclass(frozen=True)
class RecordReaders:
    """How records are read: `decode` reads those of single tokens, `prefill` those of prompts
    (into staging groups of `group_records`; without any, prompts go through the banks)."""

    decode: Reader
    prefill: Reader
    group_records: int


@dataclass(frozen=True)
class Kernels:
    """Which kernels run over slots: for single tokens, and for prompts."""

    decode: ExpertKernel
    prefill: ExpertKernel

    def bind(
        self, spec: ExpertSpec, weights: Mapping[str, mx.array]
    ) -> tuple[ExpertForward, ExpertForward]:
        """Both over these arrays."""
        return self.decode(weights, spec), self.prefill(weights, spec)


def stream_experts(
    model: nn.Module,
    store: Store,
    layers: Sequence[LayerLayout],
    *,
    slots: Sequence[int],
    reading: RecordReaders,
    kernels: Kernels,
    meter: Meter,
    widen: bool,
    predict: Sequence[Predict | None] = (),
) -> StreamingModel:
    """Replace every routed-expert module of `model` with one over a bank of its own.

    `layers` are the store's, with the top-k that the model runs with, `slots` what each bank has.
    `predict` gives, per layer, what predicts the next one's experts; None where nothing does.
    Staging groups are shared by the layers of one record layout.
    """
    banks = tuple(
        LayerBank(
            store,
            layer.unit,
            reading.decode,
            meter,
            n_slots=n_slots,
            widen=widen,
            most_slots=layer.n_experts,
        )
        for layer, n_slots in zip(layers, slots, strict=True)
    )
    prefetchers = _prefetchers(banks, predict)
    modules = expert_modules(model)
    watch = LayerWatch()
    stagings: dict[RecordLayout, Staging] = {}
    streamed: dict[str, StreamedExperts] = {}
    for number, (layer, bank) in enumerate(zip(layers, banks, strict=True)):
        module = modules[layer.path]
        spec = _spec(layer, module)
        prefill = None
        if reading.group_records:
            if layer.record not in stagings:
                stagings[layer.record] = Staging(layer.record, reading.group_records, widen)
            staging = stagings[layer.record]
            forwards = [kernels.prefill(group.weights, spec) for group in staging.groups]
            path = store.file(layer.file)
            prefill = ExpertPrefill(
                path, layer.unit, reading.prefill, meter, bank, staging, forwards
            )
        streamed[layer.path] = StreamedExperts(
            bank,
            partial(kernels.bind, spec),
            meter,
            extra_children(module),
            prefill,
            prefetchers[number],
            watch,
            number,
        )
    replace_modules(model, streamed)
    return StreamingModel(model, tuple(streamed.values()), banks, tuple(stagings.values()), watch)


def _prefetchers(
    banks: Sequence[LayerBank], predict: Sequence[Predict | None]
) -> list[Prefetcher | None]:
    """Per layer, what prefetches into the next one's bank, where that is of use."""
    trial = Trial(disturbed=lambda: any(bank.warm_starting for bank in banks))
    found: list[Prefetcher | None] = [None] * len(banks)
    for number, (predicted, here, after) in enumerate(zip(predict, banks, banks[1:], strict=False)):
        if predicted is not None and reads_apart(here.record_bytes) and after.can_prefetch:
            found[number] = Prefetcher(predicted, after, trial)
    return found


def _spec(layout: LayerLayout, module: nn.Module) -> ExpertSpec:
    packing = {
        name: ProjectionPacking(q.bits, q.group_size, q.mode)
        for name, q in layout.projections.items()
    }
    return ExpertSpec(layout.kind, module.activation, packing)
