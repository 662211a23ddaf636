"""Experts that compute while others are read: the same bits, and nothing lost when it fails."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import flashmoe
from flashmoe import FlashMoEModel, ReadError
from flashmoe.bank.slot_table import ABSENT
from flashmoe.engine import build
from flashmoe.io.threads import ThreadReader
from flashmoe.store.reader import Store
from flashmoe.streaming import experts
from tests.support.banks import LAYOUT, STRIDE, make_bank, memory_reader, store
from tests.support.families import FAMILIES, save_checkpoint
from tests.support.natives import compiled
from tests.support.readers import FaultyReader, MemoryReader

__all__ = ["store"]
PROMPT = [(7 * i + 3) % 101 for i in range(12)]
CHOSEN = ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3"]


def decoded(store: Store, kernel: str, cache: str = "min") -> tuple[list[Any], Any]:
    with FlashMoEModel(store, cache=cache, kernel=kernel, prefetch=False) as model:
        caches = make_prompt_cache(model.model)
        outputs = [np.array(model.model(mx.array([PROMPT]), cache=caches))]
        for token in (5, 90, 41, 7, 63):
            outputs.append(np.array(model.model(mx.array([[token]]), cache=caches)))
        model.check_integrity()
        return outputs, model.totals()


def assert_overlap_changes_nothing(
    folder: Path, family: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(folder / "checkpoint", family)
    store = flashmoe.repack(folder / "checkpoint", folder / "store")
    expected, plain = decoded(store, kernel)
    calls = []
    overlapped = experts.StreamedExperts._run_overlapped

    def counted(self: Any, x: mx.array, routed: Any, predicted: None) -> mx.array:
        calls.append(routed)
        return overlapped(self, x, routed, predicted)

    monkeypatch.setattr("flashmoe.bank.arrivals.APART_BYTES", 0)
    monkeypatch.setattr(experts.StreamedExperts, "_run_overlapped", counted)
    monkeypatch.setattr(
        build, "open_reader", lambda name, page_cache: FaultyReader(ThreadReader(4), seed=3)
    )
    for cache in ("min", "1GB"):
        outputs, stats = decoded(store, kernel, cache)
        for ours, theirs in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        if cache == "min":
            assert (stats.hits, stats.misses) == (plain.hits, plain.misses)
            assert stats.bytes_read == plain.bytes_read
    assert len(calls) == 2 * 5 * len(store.manifest.layers)


@pytest.mark.parametrize("family", CHOSEN)
def test_reference(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert family in FAMILIES
    assert_overlap_changes_nothing(tmp_path, family, "reference", monkeypatch)


@compiled
@pytest.mark.parametrize("family", CHOSEN)
def test_native(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_overlap_changes_nothing(tmp_path, family, "cpu", monkeypatch)


class Steered(MemoryReader):
    """Batches end in the order that the test says: last submitted first, one per wait."""

    interrupt = False

    def wait_any(self, tickets: Any) -> int:
        if self.interrupt:
            raise KeyboardInterrupt
        return len(tickets) - 1


def steered(store: Store, bad_offset: int | None = None) -> Steered:
    path = store.file(LAYOUT.file)
    return Steered({path: path.read_bytes()}, bad_offset)


def test_records_land_apart(store: Store) -> None:
    bank, stats = make_bank(store, memory_reader(store), n_slots=4)
    bank.acquire([2])
    with bank.request([2, 5, 6], apart=True) as arrivals:
        assert bank.resident([2, 5, 6]) == [2]
        landed = []
        while found := bank.wait(arrivals):
            landed += found
            assert set(bank.resident([2, 5, 6])) == {2, *landed}
    assert sorted(landed) == [5, 6]
    assert (stats.hits, stats.misses, stats.bytes_read) == (1, 3, 3 * STRIDE)
    bank.check_integrity()


def test_leaving_early_waits_for_the_rest(store: Store) -> None:
    bank, _ = make_bank(store, memory_reader(store), n_slots=4)
    with bank.request([1, 5, 6], apart=True):
        pass
    assert bank.resident([1, 5, 6]) == [1, 5, 6]
    bank.check_integrity()


def test_a_record_that_fails_leaves_the_others(store: Store) -> None:
    bad = LAYOUT.record_offset(5)
    bank, stats = make_bank(store, steered(store, bad), n_slots=4)
    with pytest.raises(ReadError) as caught, bank.request([1, 5, 6], apart=True) as arrivals:
        while bank.wait(arrivals):
            pass
    assert (caught.value.errno, caught.value.offset) == (errno.EIO, bad)
    assert 5 not in bank.resident(range(LAYOUT.n_experts))
    bank.check_integrity()
    table = bank.acquire([1, 6])
    assert ABSENT not in table[[1, 6]]
    with pytest.raises(ReadError):
        bank.acquire([5])
    assert stats.misses >= 4
    bank.check_integrity()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_loses_what_had_not_landed(store: Store, error: type[BaseException]) -> None:
    reader = steered(store)
    bank, _ = make_bank(store, reader, n_slots=4)
    with pytest.raises(error), bank.request([1, 5, 6], apart=True) as arrivals:
        if error is KeyboardInterrupt:
            reader.interrupt = True
            bank.wait(arrivals)
        raise error
    assert bank.resident([1, 5, 6]) == []
    bank.check_integrity()
    reader.interrupt = False
    bank.acquire([1, 5, 6])
    bank.check_integrity()
