"""Warm start: free slots only, behind everything else, nothing read twice, same results."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import flashmoe
from flashmoe import FlashMoEModel, ReadError
from flashmoe.bank.bank import LayerBank
from flashmoe.engine import build
from flashmoe.io.reader import Priority, ReadRequest, Ticket
from flashmoe.io.threads import ThreadReader
from flashmoe.memory.budget import layer_demands
from flashmoe.store.reader import Store
from tests.support.banks import (
    LAYOUT,
    STRIDE,
    Slow,
    assert_holds,
    make_bank,
    memory_reader,
    slow,
    store,
)
from tests.support.families import save_checkpoint
from tests.support.natives import compiled
from tests.support.readers import FaultyReader

__all__ = ["store"]


def offsets(reader: Slow) -> list[int]:
    """The experts whose low-priority reads were asked for, in this order."""
    places = [LAYOUT.record_offset(expert) for expert in range(LAYOUT.n_experts)]
    return [places.index(ticket._requests[0].offset) for ticket in reader.waiting]


def test_the_most_valuable_are_read_in_disk_order(store: Store) -> None:
    reader = slow(store)
    bank, stats = make_bank(store, reader, n_slots=6)
    bank.warm_start([7, 4, 5, 0])
    assert offsets(reader) == [4, 5, 7]
    bank.check_integrity()
    for ticket in reader.waiting:
        ticket.end()
    assert_holds(bank, [4, 7, 1])
    assert (stats.hits, stats.misses, stats.bytes_read) == (2, 1, 4 * STRIDE)
    assert (stats.warm_started, stats.warm_started_used, stats.prefetched) == (3, 2, 0)
    # Asked for again, it counts once.
    bank.acquire([4, 5])
    assert (stats.warm_started, stats.warm_started_used) == (3, 3)


def test_warm_starts_are_read_behind_prefetches(store: Store) -> None:
    priorities = []

    class Noting(Slow):
        def submit(self, requests: Any, priority: Priority = Priority.DEMAND) -> Any:
            priorities.append(priority)
            return super().submit(requests, priority)

    path = store.file(LAYOUT.file)
    bank, _ = make_bank(store, Noting({path: path.read_bytes()}), n_slots=8)
    bank.warm_start([1, 2])
    bank.prefetch([3])
    bank.acquire([0])
    assert priorities == [Priority.WARM_START] * 2 + [Priority.PREFETCH, Priority.DEMAND]


def test_one_that_has_begun_is_waited_for(store: Store) -> None:
    reader = slow(store)
    bank, stats = make_bank(store, reader, n_slots=6)
    bank.warm_start([4, 5])
    reader.waiting[0].begun = True
    assert_holds(bank, [4, 2])
    assert (stats.hits, stats.misses, stats.bytes_read) == (0, 2, 2 * STRIDE)
    assert (stats.warm_started, stats.warm_started_used) == (1, 1)


def test_one_that_has_not_begun_is_demanded_instead(store: Store) -> None:
    reader = slow(store)
    bank, stats = make_bank(store, reader, n_slots=6)
    bank.warm_start([4, 5])
    assert_holds(bank, [4, 2])
    assert [ticket.dropped for ticket in reader.waiting] == [True, False]
    assert (stats.misses, stats.bytes_read, stats.warm_started) == (2, 2 * STRIDE, 0)


def test_the_least_valuable_gives_way_to_what_is_needed(store: Store) -> None:
    reader = slow(store)
    bank, _ = make_bank(store, reader, n_slots=6)
    bank.warm_start([6, 3, 5])
    assert_holds(bank, [0, 1, 2])
    assert [ticket.dropped for ticket in reader.waiting] == [False, False, False]
    assert_holds(bank, [4, 6])
    assert offsets(reader) == [3, 5, 6]
    # One was demanded in its own slot, and another gave way rather than one that was read.
    assert [ticket.dropped for ticket in reader.waiting] == [False, True, True]
    assert set(bank.held()) == {0, 1, 2, 4, 6}
    bank.check_integrity()


@pytest.mark.parametrize(("n_slots", "expected"), [(3, 0), (4, 1), (5, 2), (8, 5)])
def test_a_tokens_needs_always_fit(store: Store, n_slots: int, expected: int) -> None:
    reader = slow(store)
    bank, _ = make_bank(store, reader, n_slots=n_slots)
    bank.warm_start([7, 6, 5, 4, 3])
    assert len(reader.waiting) == expected
    for ticket in reader.waiting:
        ticket.begun = True
    assert_holds(bank, [0, 1, 2])
    assert_holds(bank, [0, 1, 3])
    bank.check_integrity()


def test_predictions_leave_warm_starts_alone(store: Store) -> None:
    reader = slow(store)
    bank, stats = make_bank(store, reader, n_slots=8)
    bank.warm_start([1, 2, 3])
    bank.prefetch([2, 5, 6, 7])
    assert offsets(reader) == [1, 2, 3, 5, 6]
    bank.prefetch([4])
    assert [ticket.dropped for ticket in reader.waiting] == [False] * 3 + [True, True, False]
    assert stats.prefetched == 3
    bank.check_integrity()


def test_value_outlives_the_order_of_reading(store: Store) -> None:
    bank, _ = make_bank(store, memory_reader(store), n_slots=8)
    bank.warm_start([6, 1, 4, 0, 3])
    assert bank.by_value() == [6, 1, 4, 0, 3]
    bank.acquire([3])
    assert bank.by_value() == [3, 6, 1, 4, 0]


def test_a_smaller_bank_takes_the_more_valuable_ones(store: Store) -> None:
    bank, _ = make_bank(store, memory_reader(store), n_slots=5)
    bank.warm_start([6, 1, 4, 0, 3])
    assert bank.by_value() == [6, 1]


def test_a_pause_gives_slots_back_and_can_end(store: Store) -> None:
    reader = slow(store)
    bank, stats = make_bank(store, reader, n_slots=7)
    bank.warm_start([6, 3, 5, 1])
    reader.waiting[0].begun = True
    bank.pause_warm_start([1, 2])
    assert bank.held() == [1]
    assert bank.n_free == 6
    assert (stats.warm_started, stats.warm_started_used) == (1, 1)
    bank.check_integrity()
    bank.acquire([0, 2, 4])
    bank.resume_warm_start()
    # There is room for three that nobody needs; two of the free slots were taken.
    assert offsets(reader)[4:] == [3, 5, 6]
    bank.check_integrity()


def test_failed_warm_starts_are_forgotten_until_demanded(store: Store) -> None:
    bank, stats = make_bank(store, slow(store, bad_offset=LAYOUT.record_offset(4) + 10), n_slots=6)
    bank.warm_start([4, 1])
    for ticket in bank._reader.waiting:  # type: ignore[attr-defined]
        ticket.end()
    assert_holds(bank, [1, 2])
    assert stats.warm_started == 1
    bank.check_integrity()
    with pytest.raises(ReadError):
        bank.acquire([4])
    bank.check_integrity()


def test_widened_records_are_not_warm_started(store: Store) -> None:
    reader = slow(store)
    bank, _ = make_bank(store, reader, n_slots=8, widen=True)
    bank.warm_start([4, 1])
    assert reader.waiting == []


def test_closing_gives_up_what_has_not_begun(store: Store) -> None:
    reader = slow(store)
    bank, _ = make_bank(store, reader, n_slots=8)
    bank.warm_start([4, 1])
    bank.close()
    assert all(ticket.dropped for ticket in reader.waiting)
    bank.warm_start([2])
    assert len(reader.waiting) == 2


class Holding(ThreadReader):
    """Keeps warm_starting from beginning; notes every record that is read."""

    def __init__(self) -> None:
        super().__init__(2)
        self.read: Counter[tuple[Path, int]] = Counter()
        self.held: list[HeldTicket] = []

    def submit(
        self, requests: Sequence[ReadRequest], priority: Priority = Priority.DEMAND
    ) -> Ticket:
        if priority == Priority.WARM_START:
            self.held.append(HeldTicket())
            return self.held[-1]  # type: ignore[return-value]
        self.read.update((request.path, request.offset) for request in requests)
        return super().submit(requests, priority)


class HeldTicket:
    dropped = False

    def done(self) -> bool:
        return self.dropped

    def cancel(self) -> int:
        self.dropped = True
        return 1


@compiled
def test_a_prompt_reads_nothing_twice(demo_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Holding()
    monkeypatch.setattr(build, "open_reader", lambda name, page_cache: reader)
    with FlashMoEModel.from_pretrained(demo_store, cache="1GB", kernel="cpu") as model:
        assert model.memory_plan.prompts.group_records > 0
        model._running.streaming.warm_start([list(range(32))] * 6)  # type: ignore[union-attr]
        assert len(reader.held) == 6 * (32 - model.store.manifest.layers[0].layout.top_k)
        model.generate("What does the word barn mean in a sentence about a farm?", 8)
        model.check_integrity()
    assert max(reader.read.values()) == 1


def outputs(store: Store, cache: str, experts: Sequence[Sequence[int]] | None) -> Any:
    with FlashMoEModel(store, cache=cache, kernel="cpu", dtype="float32") as model:
        if experts is not None:
            model._running.streaming.warm_start(experts)  # type: ignore[union-attr]
        caches = make_prompt_cache(model.model)
        logits = [np.array(model.model(mx.array([list(range(9))]), cache=caches))]
        for token in (5, 90, 41, 7, 63, 12, 3):
            logits.append(np.array(model.model(mx.array([[token]]), cache=caches)))
            model.check_integrity()
        return logits, model.totals()


@compiled
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_no_warm_start_changes_a_result(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "checkpoint", family)
    store = flashmoe.repack(tmp_path / "checkpoint", tmp_path / "store")
    expected, _ = outputs(store, "min", None)
    monkeypatch.setattr(
        build, "open_reader", lambda name, page_cache: FaultyReader(ThreadReader(4), seed=3)
    )
    units = [layer.layout.unit for layer in store.manifest.layers]
    draw = random.Random(2)
    wanted = [draw.sample(range(unit.n_records), unit.n_records) for unit in units]
    demands = layer_demands(units, widen=False)
    slots = sum(demand.slot_bytes * (demand.least + 2) for demand in demands)
    warm_started = 0
    for cache in ("min", f"{slots}B", "1GB"):
        found, stats = outputs(store, cache, wanted)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert stats.warm_started_used <= stats.warm_started
        warm_started += stats.warm_started
    assert warm_started > 0


def test_integrity_counts_slots_that_are_warm_started(store: Store) -> None:
    bank: LayerBank = make_bank(store, slow(store), n_slots=6)[0]
    bank.warm_start([4])
    bank._free.append(bank._warm_start.slots[0])
    with pytest.raises(flashmoe.FlashMoEError, match="slots being read"):
        bank.check_integrity()
