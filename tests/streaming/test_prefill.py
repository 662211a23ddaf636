"""Prompts through staging: the bytes of the path through the bank, every record read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import flashmoe
from flashmoe import FlashMoEError, FlashMoEModel, ReadError, native
from flashmoe.bank.bank import LayerBank
from flashmoe.bank.meter import Meter
from flashmoe.bank.slot_memory import SlotMemory
from flashmoe.engine import build
from flashmoe.io.reader import Priority, Reader, ReadRequest, Ticket
from flashmoe.io.threads import ThreadReader
from flashmoe.kernels import metal
from flashmoe.memory import budget
from flashmoe.store.reader import Store, open_store
from flashmoe.streaming.prefill import RoutedRows, choose_adopted
from tests.support.families import save_checkpoint
from tests.support.metal_on_cpu import compiled as on_cpu
from tests.support.metals import harness
from tests.support.readers import FaultyReader
from tests.support.stores import layer_contents, layer_layout, resident_contents, write_store

FAMILIES = ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3", "llama4"]
KERNELS = ["reference", "cpu"] if native.available() is None else ["reference"]
PROMPT = [(7 * i + 3) % 101 for i in range(40)]
BATCH = [[(11 * i + 2) % 101 for i in range(36)], [(13 * i + 7) % 101 for i in range(36)]]


class CountingReader(ThreadReader):
    """Notes the offsets of every batch."""

    def __init__(self) -> None:
        super().__init__(4)
        self.batches: list[list[tuple[Path, int]]] = []

    def submit(
        self, requests: Sequence[ReadRequest], priority: Priority = Priority.DEMAND
    ) -> Ticket:
        self.batches.append([(request.path, request.offset) for request in requests])
        return super().submit(requests, priority)

    @property
    def times_read(self) -> Counter[tuple[Path, int]]:
        return Counter(place for batch in self.batches for place in batch)


def logits(model: FlashMoEModel) -> list[mx.array]:
    """A prompt into a cold bank, what follows it, a batch, and the prompt again."""
    module = model.model
    cache = make_prompt_cache(module)
    outputs = [module(mx.array([PROMPT]), cache=cache), module(mx.array([[5]]), cache=cache)]
    outputs += [module(mx.array(BATCH)), module(mx.array([PROMPT]))]
    mx.eval(outputs)
    model.check_integrity()
    return outputs


def long_prompt(seed: int) -> mx.array:
    """Tokens of the demo model that route to most of its experts."""
    return mx.array(np.random.default_rng(seed).integers(3, 4096, (1, 90)))


def least_and(store: Store, more_slots: int) -> int:
    """A bank of one token's needs and so many slots more in each layer."""
    demands = budget.layer_demands(
        [layer.layout.unit for layer in store.manifest.layers], widen=True
    )
    return sum(d.slot_bytes * min(d.most, d.least + more_slots) for d in demands)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`use(group_records, reader)` decides what models are loaded with."""

    def choose(group_records: int, reader: Reader | None = None) -> None:
        monkeypatch.setattr(budget, "GROUP_RECORDS", (0, group_records))
        if reader is not None:
            monkeypatch.setattr(build, "open_reader", lambda name, page_cache: reader)

    return choose


@pytest.fixture(scope="module", params=FAMILIES)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp(request.param)
    save_checkpoint(folder / "checkpoint", request.param, dtype=mx.bfloat16)
    return flashmoe.repack(folder / "checkpoint", folder / "store")


@pytest.fixture
def small_model(demo_store: Path, use: Any) -> Iterator[tuple[FlashMoEModel, CountingReader]]:
    reader = CountingReader()
    use(3, reader)
    with FlashMoEModel.from_pretrained(demo_store, cache="min") as model:
        yield model, reader


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_bytes_as_through_the_bank(store: Store, use: Any, kernel: str) -> None:
    use(0)
    with FlashMoEModel(store, cache="min", kernel=kernel) as model:
        assert model.memory_plan.prompts.group_records == 0
        expected = logits(model)
    for group_records, more_slots in [(1, 0), (3, 2), (2, 99), (16, 1)]:
        use(group_records, FaultyReader(ThreadReader(3), seed=group_records))
        with FlashMoEModel(store, cache=least_and(store, more_slots), kernel=kernel) as model:
            assert model.memory_plan.prompts.group_records == min(group_records, 8)
            for ours, theirs in zip(logits(model), expected, strict=True):
                assert mx.array_equal(ours, theirs)


@pytest.mark.parametrize("kernel", KERNELS)
def test_16_bit_activations(tmp_path: Path, use: Any, kernel: str) -> None:
    save_checkpoint(tmp_path / "checkpoint", "qwen3_moe", dtype=mx.bfloat16)
    store = flashmoe.repack(tmp_path / "checkpoint", tmp_path / "store")
    outputs = []
    for group_records in (0, 2):
        use(group_records)
        with FlashMoEModel(store, cache="min", dtype="stored", kernel=kernel) as model:
            outputs.append(logits(model))
    for ours, theirs in zip(*outputs, strict=True):
        assert ours.dtype == mx.bfloat16
        assert mx.array_equal(ours, theirs)


@on_cpu
def test_the_same_bytes_from_metal(
    tmp_path: Path, home: Path, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows, so that how many share a call would change which of the kernels they meet."""
    monkeypatch.setattr(metal, "available", lambda: None)
    save_checkpoint(tmp_path / "checkpoint", "qwen3_moe")
    store = flashmoe.repack(tmp_path / "checkpoint", tmp_path / "store")
    outputs = []
    with harness():
        for group_records, more_slots in [(0, 0), (1, 0), (16, 3)]:
            use(group_records)
            bank_bytes = least_and(store, more_slots)
            with FlashMoEModel(store, cache=bank_bytes, kernel="metal") as model:
                outputs.append([model.model(mx.array([PROMPT[:n]])) for n in (5, 3, 12)])
                mx.eval(outputs[-1])
    for other in outputs[1:]:
        for ours, theirs in zip(other, outputs[0], strict=True):
            assert mx.array_equal(ours, theirs)


def test_each_needed_record_is_read_once(small_model) -> None:
    model, reader = small_model
    prompt = long_prompt(0)
    mx.eval(model.model(prompt))
    first = model.totals()
    assert first.hits == 0
    assert first.misses > 6 * 20
    assert set(reader.times_read.values()) == {1}
    assert len(reader.times_read) == first.misses
    (stride,) = {layer.layout.record.stride for layer in model.store.manifest.layers}
    assert first.bytes_read == first.bytes_demanded == stride * first.misses
    for batch in reader.batches:
        assert len(batch) <= 3
        assert batch == sorted(batch)
        assert len({path for path, _ in batch}) == 1

    reader.batches.clear()
    mx.eval(model.model(prompt))
    again = model.totals().since(first)
    # What was taken into the bank, two slots a layer, is not read.
    assert again.hits == 12
    assert again.hits + again.misses == first.misses
    assert set(reader.times_read.values()) == {1}
    assert len(reader.times_read) == again.misses
    model.check_integrity()


def test_the_most_used_experts_stay(small_model, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = small_model
    routed: list[Counter[int]] = []
    of = RoutedRows.of.__func__

    def noting(cls: Any, indices: Any) -> RoutedRows:
        routed.append(Counter(indices.reshape(-1).tolist()))
        return of(cls, indices)

    monkeypatch.setattr(RoutedRows, "of", classmethod(noting))
    prompt = long_prompt(1)
    mx.eval(model.model(prompt))
    for bank, uses in zip(model._running.streaming.banks, routed, strict=True):
        least = min(uses[expert] for expert in bank.held())
        assert least >= max(uses[e] for e in uses if e not in bank.held())


def test_every_expert_in_the_bank_reads_nothing(demo_store: Path, use: Any) -> None:
    reader = CountingReader()
    use(4, reader)
    with FlashMoEModel.from_pretrained(demo_store, cache=10**8) as model:
        prompt = long_prompt(0)
        first = model.model(prompt)
        mx.eval(first)
        reader.batches.clear()
        assert mx.array_equal(model.model(prompt), first)
        assert reader.batches == []


@pytest.mark.parametrize("bad_record", [0, 5, 31])
def test_a_failed_read(demo_store: Path, use: Any, bad_record: int) -> None:
    prompt = long_prompt(0)
    use(2)
    with FlashMoEModel.from_pretrained(demo_store, cache="min") as model:
        expected = model.model(prompt)
        mx.eval(expected)
        layout = model.store.manifest.layers[3].layout
    reader = FaultyReader(ThreadReader(4), seed=1)
    use(2, reader)
    with FlashMoEModel.from_pretrained(demo_store, cache="min") as model:
        for _ in range(2):
            reader._bad_offset = layout.record_offset(bad_record) + 100
            with pytest.raises(ReadError):
                mx.eval(model.model(prompt))
            model.check_integrity()
        reader._bad_offset = None
        for _ in range(2):
            assert mx.array_equal(model.model(prompt), expected)
            model.check_integrity()


@pytest.mark.parametrize(
    ("place", "after"),
    [("submit", 0), ("submit", 1), ("submit", 12), ("adopt", 0), ("adopt", 1), ("make_room", 3)],
)
def test_an_interrupt(small_model, monkeypatch: pytest.MonkeyPatch, place: str, after: int) -> None:
    model, reader = small_model
    prompt = long_prompt(0)
    expected = model.model(prompt)
    mx.eval(expected)
    owner: Any = reader if place == "submit" else type(model._running.streaming.banks[0])
    original = getattr(owner, place)
    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*arguments)
        if calls > after:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patched:
        patched.setattr(owner, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            mx.eval(model.model(long_prompt(5)))
    model.check_integrity()
    assert mx.array_equal(model.model(prompt), expected)
    model.check_integrity()


def test_runs_keep_an_experts_rows_together() -> None:
    rows = RoutedRows.of(np.array([[3, 1], [1, 7], [3, 1], [1, 5]]))
    assert rows.experts.tolist() == [1, 3, 5, 7]
    assert rows.counts.tolist() == [4, 2, 1, 1]
    assert rows.order.tolist() == [1, 2, 5, 6, 0, 4, 7, 3]
    everything = np.arange(4)
    split = [run.tolist() for run in rows.split(everything, 2, 100)]
    assert split == [[0, 1], [2, 3]]
    assert [run.tolist() for run in rows.split(everything, 9, 3)] == [[0], [1, 2], [3]]
    assert rows.split(everything[:0], 2, 4) == []
    assert rows.pairs(np.array([1, 3])).tolist() == [0, 4, 3]


@pytest.mark.parametrize(
    ("staged", "resident", "n_free", "adopted", "leaving"),
    [
        ({1: 5, 2: 1}, {}, 4, {1, 2}, 0),
        ({1: 5, 2: 7, 3: 6}, {}, 2, {2, 3}, 0),
        ({1: 5, 2: 7}, {8: 5, 9: 6}, 0, {2}, 1),
        ({1: 5, 2: 7}, {8: 0, 9: 0}, 0, {1, 2}, 2),
        ({1: 5}, {8: 5}, 0, set(), 0),
        ({1: 2, 2: 3, 3: 4}, {8: 3, 9: 0}, 1, {2, 3}, 1),
    ],
)
def test_who_is_adopted(staged, resident, n_free, adopted, leaving) -> None:
    assert choose_adopted(staged, resident, n_free) == (adopted, leaving)


def test_room_is_made_by_the_least_used_and_then_the_policy(tmp_path: Path) -> None:
    layout = layer_layout(n_experts=8, top_k=3)
    write_store(tmp_path / "store", [(layout, layer_contents(layout))], resident_contents())
    reader = ThreadReader(2)
    bank = LayerBank(
        open_store(tmp_path / "store"), layout.unit, reader, Meter(), n_slots=4, widen=False
    )
    other = SlotMemory(layout.record, 1, 1, widen=False)
    for expert in (2, 0, 1, 3):
        bank.acquire([expert])
    bank.make_room({0: 1, 1: 0, 2: 1, 3: 5}, 2)
    assert (bank.held(), bank.n_free) == ([0, 3], 2)
    bank.adopt(6, other, 0)
    assert (bank.held(), bank.n_free) == ([0, 3, 6], 1)
    bank.check_integrity()
    bank.use([3, 0, 7])
    bank.acquire([4, 5])
    assert bank.held() == [0, 3, 4, 5]
    bank.check_integrity()
    bank.close()
    with pytest.raises(FlashMoEError, match="closed"):
        bank.slot_table()
    reader.close()
