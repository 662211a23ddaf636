"""What reading ahead gains where it pays, and costs where it cannot, by its own trial of both.

In a time of the test's own: a layer computes for as long as it is told, and the disk takes so
many times as long for what layers miss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flashmoe import FlashMoEModel
from flashmoe.engine import build
from flashmoe.generation.report import Report
from flashmoe.generation.token_state import TokenState
from flashmoe.io.reader import Reader
from flashmoe.io.threads import ThreadReader
from flashmoe.memory.budget import layer_demands
from flashmoe.model import load
from flashmoe.store.reader import Store
from flashmoe.streaming.prefetcher import HOLD, WINDOW, Trial
from tests.support.virtual_disk import Time, VirtualDisk
from tests.support.wide import N_EXPERTS, TOP_K, wide_store

# Of a layer: before its routed experts are known, and in their kernel.
ATTENTION_SECONDS, EXPERTS_SECONDS = 0.008, 0.004
N_LAYERS = 8
SLOTS = 6
PROMPT, TOKENS = 64, 2 * WINDOW + 1
Predictions = Callable[[int, int], list[int]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return wide_store(tmp_path_factory.mktemp("gain"), "qwen3_moe", N_LAYERS)


class Runs:
    """Runs of one model over the same tokens, and what they route to: [layer][token]."""

    def __init__(
        self,
        store: Store,
        patch: pytest.MonkeyPatch,
        slots: int = SLOTS,
        prompt: int = PROMPT,
        tokens: int = TOKENS,
    ) -> None:
        self._store = store
        self._slots, self._prompt, self._tokens = slots, prompt, tokens
        # Whether a warm start reads every expert that there is room for.
        self.warm_starting = False
        self.told_of_warm_start = True
        self._patch = patch
        self.record_bytes = store.manifest.layers[0].layout.record.stride
        self.routed: list[list[list[int]]] = [[] for _ in range(N_LAYERS)]
        with self._model(prefetch=False) as model:

            def note(layer: int, experts: Any) -> None:
                if experts.size == TOP_K:
                    self.routed[layer].append(experts.reshape(-1).tolist())

            model.observe_routing(note)
            stats = self._decode(model)
        self.missed_bytes = stats.bytes_read / tokens

    def trial(self, predictions: Predictions, slowness: float) -> tuple[Trial, Report]:
        """A run behind a disk that reads for `slowness` times as long as layers compute, with
        `predictions(layer, token)` about the next layer."""
        time = Time()
        computing = N_LAYERS * (ATTENTION_SECONDS + EXPERTS_SECONDS)
        rate = self.missed_bytes / (slowness * computing)

        def open_slow(name: Any, *, page_cache: bool) -> Reader:
            return VirtualDisk(ThreadReader(4), rate, time)

        def slow_kernel(*args: Any, select: Any = build.select_kernel) -> Any:
            kernel = select(*args)

            def bind(weights: Any, spec: Any) -> Any:
                forward = kernel(weights, spec)

                def call(x: mx.array, slots: Any) -> mx.array:
                    time.now += EXPERTS_SECONDS * slots.size / TOP_K
                    result: mx.array = forward(x, slots)
                    return result

                return call

            return bind

        seen = [0] * N_LAYERS

        def attend(layer: int, experts: Any) -> None:
            if experts.size == TOP_K:
                time.now += ATTENTION_SECONDS
                seen[layer] += 1

        def predict(layer: int) -> Any:
            return lambda x: mx.array(predictions(layer, seen[layer]))

        self._patch.setattr(build, "open_reader", open_slow)
        self._patch.setattr(build, "select_kernel", slow_kernel)
        self._patch.setattr(
            build, "find_predictors", lambda *_: [*map(predict, range(N_LAYERS - 1)), None]
        )
        told = self.told_of_warm_start
        self._patch.setattr(
            load,
            "Trial",
            lambda disturbed: Trial(lambda: time.now, disturbed if told else lambda: False),
        )
        with self._model(prefetch=True) as model:
            model.observe_routing(attend)
            stats = self._decode(model)
            assert model._running.streaming is not None
            prefetcher = model._running.streaming.layers[0]._prefetcher
            assert prefetcher is not None
            return prefetcher._trial, stats

    def _model(self, *, prefetch: bool) -> FlashMoEModel:
        units = [layer.layout.unit for layer in self._store.manifest.layers]
        slot_bytes = sum(demand.slot_bytes for demand in layer_demands(units, widen=False))
        return FlashMoEModel(self._store, cache=self._slots * slot_bytes, prefetch=prefetch)

    def _decode(self, model: FlashMoEModel) -> Report:
        """After a prompt, if there is one; what the tokens took."""
        ids = np.random.default_rng(1).integers(0, 128, PROMPT + self._tokens).tolist()
        state = TokenState(model.model, model._running.meter.clock, 64)
        if self._prompt:
            state.feed(ids[: self._prompt])
        if self.warm_starting:
            assert model._running.streaming is not None
            model._running.streaming.warm_start([list(range(N_EXPERTS))] * N_LAYERS)
        before = model.totals()
        for token in ids[PROMPT:]:
            state.feed([token])
        return model.totals().since(before)


@pytest.fixture
def runs(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    yield Runs(store, monkeypatch)


@pytest.mark.parametrize("slowness", [2.0, 1.0])
def test_it_gains_a_tenth_where_the_disk_is_slow(runs: Runs, slowness: float) -> None:
    trial, stats = runs.trial(lambda layer, token: runs.routed[layer + 1][token], slowness)
    medians = {way: float(np.median(times)) for way, times in trial._times.items()}
    assert trial.on
    assert medians[False] / medians[True] - 1 >= 0.10, medians
    assert stats.prefetch_precision == 1.0
    # What is prefetched is read once, like what is missed.
    needed = (stats.prefetched_used + stats.not_prefetched) * runs.record_bytes
    assert stats.bytes_read <= 1.02 * needed


@pytest.mark.parametrize("slowness", [2.0, 0.1])
def test_predictions_that_are_never_right_cost_two_percent_at_most(
    runs: Runs, slowness: float
) -> None:
    def wrong(layer: int, token: int) -> list[int]:
        right = runs.routed[layer + 1][token]
        return [expert for expert in range(N_EXPERTS) if expert not in right][:TOP_K]

    trial, stats = runs.trial(wrong, slowness)
    assert stats.prefetched > 0
    # Over the tokens that take turns, and those that the better way is kept for.
    slow, fast = sum(trial._times[True]), sum(trial._times[False])
    assert len(trial._times[True]) == len(trial._times[False]) == WINDOW
    kept = (slow if trial.on else fast) * HOLD / WINDOW
    assert (slow + fast + kept) / (fast * (2 * WINDOW + HOLD) / WINDOW) <= 1.02


@pytest.mark.parametrize(("waits", "verdict"), [(True, True), (False, False)])
def test_a_warm_start_has_no_say_in_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, waits: bool, verdict: bool
) -> None:
    """Records on their way from a warm start leave predictions no room, so that with and without
    them is the same but for the order of tokens; a trial that does not wait takes that for
    predictions that do not pay."""
    runs = Runs(store, monkeypatch, slots=7, prompt=0, tokens=45)
    runs.warm_starting = True
    if not waits:
        runs.told_of_warm_start = False
    trial, stats = runs.trial(lambda layer, token: runs.routed[layer + 1][token], 1.0)
    assert stats.warm_started > N_LAYERS
    assert [len(times) for times in trial._times.values()] == [WINDOW] * 2
    assert trial.on is verdict
