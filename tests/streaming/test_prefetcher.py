"""Reading ahead: never another result, never a lost slot, and not for long where it is no use."""

from __future__ import annotations

import errno
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import flashmoe
from flashmoe import FlashMoEModel, ReadError
from flashmoe.engine import build
from flashmoe.io.threads import ThreadReader
from flashmoe.memory.budget import layer_demands
from flashmoe.store.reader import Store
from flashmoe.streaming.prefetcher import Prefetcher, Trial
from tests.support.banks import LAYOUT, STRIDE, assert_holds, make_bank, memory_reader, slow, store
from tests.support.families import save_checkpoint
from tests.support.natives import compiled
from tests.support.readers import FaultyReader

__all__ = ["store"]


def test_a_prediction_that_landed_is_a_hit(store: Store) -> None:
    bank, stats = make_bank(store, memory_reader(store), n_slots=6)
    bank.prefetch([4, 1])
    bank.check_integrity()
    assert_holds(bank, [1, 4, 6])
    assert (stats.hits, stats.misses, stats.bytes_read) == (2, 1, 3 * STRIDE)
    assert (stats.prefetched, stats.prefetched_used) == (2, 2)
    # Asked for again, it was no prediction.
    bank.acquire([1])
    assert stats.prefetched_used == 2
    bank.check_integrity()


def test_a_prediction_that_has_begun_is_waited_for(store: Store) -> None:
    reader = slow(store)
    bank, stats = make_bank(store, reader, n_slots=6)
    bank.prefetch([4])
    reader.waiting[0].begun = True
    bank.check_integrity()
    assert_holds(bank, [4, 2])
    assert (stats.hits, stats.misses, stats.prefetched_used) == (0, 2, 1)
    assert stats.bytes_read == 2 * STRIDE
    bank.check_integrity()


def test_a_prediction_that_has_not_begun_is_demanded_instead(store: Store) -> None:
    reader = slow(store)
    bank, stats = make_bank(store, reader, n_slots=6)
    bank.prefetch([4])
    assert_holds(bank, [4, 2])
    assert reader.waiting[0].dropped
    assert stats.bytes_read == 2 * STRIDE
    bank.check_integrity()


def test_a_new_prediction_cancels_the_old_one(store: Store) -> None:
    reader = slow(store)
    bank, stats = make_bank(store, reader, n_slots=8)
    bank.prefetch([4, 5, 6])
    reader.waiting[1].begun = True
    bank.prefetch([6, 7])
    assert [ticket.dropped for ticket in reader.waiting] == [True, False, False, False]
    bank.check_integrity()
    for ticket in reader.waiting:
        ticket.end()
    assert_holds(bank, [5, 6, 7])
    assert (stats.hits, stats.misses) == (3, 0)
    bank.check_integrity()


def test_what_was_prefetched_was_absent(store: Store) -> None:
    bank, stats = make_bank(store, memory_reader(store), n_slots=LAYOUT.n_experts)
    bank.prefetch([4])
    bank.acquire([4, 5])
    bank.acquire([4, 5])
    assert stats.bytes_absent == 2 * STRIDE
    assert stats.bytes_demanded == 4 * STRIDE


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("n_slots", "expected"), [(3, 3), (4, 4), (5, 4), (8, 4)])
def test_a_demand_takes_slots_back_from_wrong_predictions(
    store: Store, n_slots: int, expected: int, begun: bool
) -> None:
    reader = slow(store)
    bank, stats = make_bank(store, reader, n_slots=n_slots)
    bank.acquire([0, 1, 2])
    bank.prefetch([3, 4, 5, 6])
    assert stats.prefetched == expected
    bank.check_integrity()
    for ticket in reader.waiting:
        ticket.begun = begun
    kept = set(bank.held())
    assert_holds(bank, [0, 2, 7])
    bank.check_integrity()
    demanded = len({0, 2, 7} - kept)
    ended = [ticket for ticket in reader.waiting if ticket.done() and not ticket.dropped]
    # What has begun is waited for, and counts; nobody wanted it.
    assert stats.bytes_read == (3 + demanded + len(ended)) * STRIDE
    assert stats.bytes_wasted == len(ended) * STRIDE
    assert begun or not ended
    assert_holds(bank, [1, 3, 4])
    bank.check_integrity()


def test_a_wrong_prediction_that_fails_gives_its_slot_back(store: Store) -> None:
    reader = slow(store, bad_offset=LAYOUT.record_offset(4))
    bank, stats = make_bank(store, reader, n_slots=3)
    bank.prefetch([4, 5, 6])
    for ticket in reader.waiting:
        ticket.begun = True
    assert_holds(bank, [0, 1, 2])
    assert stats.bytes_wasted == 2 * STRIDE
    bank.check_integrity()
    with pytest.raises(ReadError):
        bank.acquire([4])
    bank.check_integrity()


def test_a_prediction_that_fails_says_so_when_it_is_demanded(store: Store) -> None:
    bad = LAYOUT.record_offset(4)
    reader = slow(store, bad)
    bank, _ = make_bank(store, reader, n_slots=6)
    bank.prefetch([4, 5])
    for ticket in reader.waiting:
        ticket.end()
    assert_holds(bank, [5])
    assert bank.resident([4, 5]) == [5]
    with pytest.raises(ReadError) as caught:
        bank.acquire([4])
    assert (caught.value.errno, caught.value.offset) == (errno.EIO, bad)
    # The same while it is under way.
    bank.prefetch([4])
    reader.waiting[-1].begun = True
    with pytest.raises(ReadError):
        bank.acquire([4, 1])
    bank.check_integrity()
    assert_holds(bank, [1, 2])


@pytest.mark.parametrize("which", [0, 1])
def test_an_interrupt_loses_no_prediction(
    store: Store, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = slow(store)
    bank, _ = make_bank(store, reader, n_slots=6)
    bank.prefetch([4, 5])
    for ticket in reader.waiting:
        ticket.end()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(reader.waiting[which], "wait", interrupted)
        for call in (bank.acquire, bank.prefetch):
            with pytest.raises(KeyboardInterrupt):
                call([1])
            bank.check_integrity()
    assert_holds(bank, [4, 5])
    bank.check_integrity()


def test_a_prompt_brings_what_was_predictioned(store: Store) -> None:
    reader = slow(store)
    bank, stats = make_bank(store, reader, n_slots=6)
    bank.prefetch([4])
    reader.waiting[0].begun = True
    other, _ = make_bank(store, memory_reader(store))
    slot = int(other.acquire([4])[4])
    bank.adopt(4, other.memory, slot)
    bank.check_integrity()
    reader.waiting[0].end()
    assert_holds(bank, [4, 1])
    bank.check_integrity()
    assert (stats.bytes_read, stats.bytes_wasted) == (2 * STRIDE, STRIDE)


def test_what_predictions_are_worth(store: Store) -> None:
    bank, stats = make_bank(store, memory_reader(store), n_slots=5)
    assert stats.prefetch_recall is stats.prefetch_precision is None

    def demand(*experts: int) -> None:
        with bank.request(experts, apart=True):
            pass

    bank.prefetch([4, 1])
    demand(4, 2, 3)
    # 4 was prefetched, 2 and 3 were not; whether 1 was read in vain is not known yet.
    assert (stats.prefetched, stats.prefetched_used, stats.not_prefetched) == (2, 1, 2)
    assert (stats.prefetch_precision, stats.prefetch_recall) == (1 / 2, 1 / 3)
    assert stats.bytes_wasted == 0
    # What is there is neither prefetched nor missing.
    demand(2, 3)
    assert (stats.prefetched_used, stats.not_prefetched) == (1, 2)
    demand(5, 6, 7)
    demand(0, 5, 6)
    assert 1 not in bank.held()
    assert stats.bytes_wasted == STRIDE
    assert stats.bytes_read == STRIDE * (4 + 4)
    # Batches that are read as one belong to prompts.
    not_prefetched = stats.not_prefetched
    bank.acquire([1, 2, 3])
    assert stats.not_prefetched == not_prefetched


def test_a_prompt_that_uses_a_prediction(store: Store) -> None:
    bank, stats = make_bank(store, memory_reader(store), n_slots=5)
    bank.prefetch([4, 1])
    bank.acquire([2])
    bank.use([4, 2])
    assert stats.prefetched_used == 1
    bank.use([4, 1])
    assert stats.prefetched_used == 2


def test_widened_records_are_not_prefetched(store: Store) -> None:
    bank, stats = make_bank(store, memory_reader(store), n_slots=6, widen=True)
    bank.prefetch([4])
    assert stats.prefetched == 0


@pytest.mark.parametrize("n_slots", [3, 5])
def test_any_order_of_predictions_and_demands(store: Store, n_slots: int) -> None:
    draw = random.Random(3)
    reader = slow(store)
    bank, stats = make_bank(store, reader, n_slots=n_slots)
    for _ in range(300):
        for ticket in reader.waiting:
            if draw.random() < 0.3:
                ticket.begun = True
            if draw.random() < 0.3:
                ticket.end()
        bank.prefetch(draw.sample(range(8), draw.randint(0, 4)))
        bank.check_integrity()
        assert_holds(bank, draw.sample(range(8), draw.randint(1, 3)))
        bank.check_integrity()
    assert 0 < stats.prefetched_used <= stats.prefetched


def prefetch_by(model: FlashMoEModel, predictions: Any) -> None:
    """Give every layer but the last a prediction at the next one's experts."""
    layers = model._running.streaming.layers  # type: ignore[union-attr]
    trial = Trial()
    for layer, after in pairwise(layers):
        bank = after._bank
        layer._prefetcher = Prefetcher(lambda x, bank=bank: predictions(x, bank), bank, trial)


def decoded(
    store: Store, kernel: str, cache: str, predictions: Any = None
) -> tuple[list[Any], Any]:
    with FlashMoEModel(store, cache=cache, kernel=kernel, dtype="float32") as model:
        if predictions is not None:
            prefetch_by(model, predictions)
        caches = make_prompt_cache(model.model)
        outputs = [np.array(model.model(mx.array([list(range(9))]), cache=caches))]
        for token in (5, 90, 41, 7, 63, 12, 3):
            outputs.append(np.array(model.model(mx.array([[token]]), cache=caches)))
            model.check_integrity()
        return outputs, model.totals()


@compiled
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_no_prediction_changes_a_result(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "checkpoint", family)
    store = flashmoe.repack(tmp_path / "checkpoint", tmp_path / "store")
    expected, _ = decoded(store, "cpu", "min")
    monkeypatch.setattr("flashmoe.bank.arrivals.APART_BYTES", 0)
    monkeypatch.setattr(
        build, "open_reader", lambda name, page_cache: FaultyReader(ThreadReader(4), seed=3)
    )
    draw = random.Random(1)

    def at_random(x: mx.array, bank: Any) -> mx.array:
        assert x.size == x.shape[-1]
        return mx.array(draw.sample(range(bank.n_records), bank.step_records))

    demands = layer_demands([layer.layout.unit for layer in store.manifest.layers], widen=False)
    slots = sum(demand.slot_bytes * (demand.least + 2) for demand in demands)
    prefetched = 0
    for cache in ("min", f"{slots}B", "1GB"):
        outputs, stats = decoded(store, "cpu", cache, at_random)
        for ours, theirs in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert stats.prefetched_used <= stats.prefetched
        prefetched += stats.prefetched
    assert prefetched > 0
