"""Parts of the engine left out: the same bits, and just as much read as that means."""

from __future__ import annotations

import errno
import itertools

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

import flashmoe
from flashmoe import FlashMoEModel, ReadError, Stats
from flashmoe.bank.bank import LayerBank
from flashmoe.store.reader import Store
from flashmoe.streaming import experts
from flashmoe.streaming.parts import ALL_PARTS, Parts
from flashmoe.streaming.whole import WholeLayer
from tests.support.banks import LAYOUT, STRIDE, make_bank, memory_reader, store
from tests.support.families import save_checkpoint
from tests.support.readers import MemoryReader

__all__ = ["store"]
PROMPT = [(7 * i + 3) % 101 for i in range(12)]
ANSWER = (5, 90, 41, 5)


@pytest.fixture(scope="module")
def qwen_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("parts")
    save_checkpoint(folder / "checkpoint", "qwen3_moe")
    return flashmoe.repack(folder / "checkpoint", folder / "store")


def decoded(store: Store, parts: Parts) -> tuple[list[bytes], Stats, int]:
    """Logits of a prompt and an answer, what decoding counted, and the bank's size."""
    with FlashMoEModel(store, memory="4GB", prefetch=False, parts=parts) as model:
        cache = make_prompt_cache(model.model)
        outputs = [model.model(mx.array([PROMPT]), cache=cache)]
        mx.eval(outputs)
        before = model.stats()
        for token in ANSWER:
            outputs.append(model.model(mx.array([[token]]), cache=cache))
            mx.eval(outputs)
        model.check_integrity()
        return (
            [bytes(memoryview(output)) for output in outputs],
            model.stats().since(before),
            model.bank_bytes,
        )


@pytest.mark.parametrize("routed, bank, overlap", [*itertools.product((True, False), repeat=3)])
def test_no_part_changes_a_bit(
    qwen_store: Store, routed: bool, bank: bool, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _, _ = decoded(qwen_store, ALL_PARTS)
    monkeypatch.setattr(experts, "APART_BYTES", 0)
    outputs, stats, bank_bytes = decoded(qwen_store, Parts(routed, bank, overlap))
    assert outputs == expected
    layouts = [layer.layout for layer in qwen_store.manifest.layers]
    records = [layout.n_experts * layout.record.stride for layout in layouts]
    demanded = [layout.top_k * layout.record.stride for layout in layouts]
    assert stats.bytes_demanded == len(ANSWER) * sum(demanded)
    if routed:
        assert stats.bytes_read == stats.bytes_absent < stats.bytes_demanded
    else:
        assert stats.bytes_read == len(ANSWER) * sum(records)
        assert (stats.hits, stats.bytes_absent) == (0, stats.bytes_demanded)
    with FlashMoEModel(qwen_store, memory="4GB", parts=ALL_PARTS) as model:
        plan = model.memory_plan
    assert plan.least_bank_bytes < plan.most_bank_bytes
    assert bank_bytes == (plan.most_bank_bytes if bank else plan.least_bank_bytes)


def test_overlap_is_off_when_it_is_said(qwen_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "APART_BYTES", 0)
    calls = []
    run = experts.StreamedExperts._run_overlapped

    def counted(self, *args):
        calls.append(args)
        return run(self, *args)

    monkeypatch.setattr(experts.StreamedExperts, "_run_overlapped", counted)
    decoded(qwen_store, Parts(overlap=False))
    assert calls == []
    decoded(qwen_store, ALL_PARTS)
    assert len(calls) == len(ANSWER) * len(qwen_store.manifest.layers)


def whole_layer(store: Store, reader: MemoryReader) -> tuple[WholeLayer, LayerBank, Stats]:
    bank, stats = make_bank(store, reader, n_slots=4)
    return WholeLayer(store.file(LAYOUT.file), LAYOUT, reader, stats, bank), bank, stats


def test_whole_layers(store: Store) -> None:
    whole, bank, stats = whole_layer(store, memory_reader(store))
    bank.acquire([0, 1])
    before = stats.copy()
    whole([1, 5])
    assert bank.held() == []
    spent = stats.since(before)
    assert spent.bytes_read == (LAYOUT.n_experts - 2) * STRIDE
    assert (spent.hits, spent.misses) == (0, 0)
    bank.check_integrity()
    bank.acquire([1, 5])
    assert bank.held() == [1, 5]
    bank.check_integrity()


def test_a_whole_layer_that_cannot_be_read(store: Store) -> None:
    path = store.file(LAYOUT.file)
    bad = LAYOUT.record_offset(3)
    whole, bank, _ = whole_layer(store, MemoryReader({path: path.read_bytes()}, bad))
    with pytest.raises(ReadError) as caught:
        whole([1])
    assert (caught.value.errno, caught.value.offset) == (errno.EIO, bad)
    whole([1, 3])
    bank.check_integrity()


def test_what_was_prefetched_was_absent(store: Store) -> None:
    bank, stats = make_bank(store, memory_reader(store), n_slots=LAYOUT.n_experts)
    bank.prefetch([4])
    bank.acquire([4, 5])
    bank.acquire([4, 5])
    assert stats.bytes_absent == 2 * STRIDE
    assert stats.bytes_demanded == 4 * STRIDE
