import errno
import os

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.bank.eviction import LRU
from flashmoe.bank.meter import Counters
from flashmoe.bank.slot_table import ABSENT
from flashmoe.base.dtypes import array_bytes
from flashmoe.base.errors import FlashMoEError, ReadError
from flashmoe.io.threads import ThreadReader
from flashmoe.store.layout import TensorSpec
from flashmoe.store.reader import open_store
from tests.support.banks import (
    CONTENTS,
    LAYOUT,
    N_EXPERTS,
    READ_BYTES,
    STRIDE,
    TOP_K,
    assert_holds,
    make_bank,
    memory_reader,
    slot_bytes,
    store,
    widened,
    write_bank_store,
)
from tests.support.readers import delayed_preadv, short_preadv
from tests.support.stores import layer_layout, record_parts, resident_contents, write_store

__all__ = ["store"]


@pytest.fixture
def own_store(tmp_path):
    """A store that the test may damage."""
    return write_bank_store(tmp_path)


class TestCounting:
    def test_hits_misses_and_bytes(self, store):
        reader = memory_reader(store)
        bank, stats = make_bank(store, reader)
        bank.acquire([0, 1])
        assert (stats.hits, stats.misses) == (0, 2)
        bank.acquire([1, 2, 0])
        assert (stats.hits, stats.misses) == (2, 3)
        bank.acquire([0, 1, 2])
        assert (stats.hits, stats.misses) == (5, 3)
        assert stats.bytes_read == 3 * STRIDE == 49_152
        assert stats.bytes_demanded == 8 * STRIDE == 131_072
        assert stats.hit_rate == 0.625
        assert (reader.counters.reads, reader.counters.bytes) == (3, 3 * READ_BYTES)

    def test_nothing_asked_for(self, store):
        bank, stats = make_bank(store, memory_reader(store))
        assert bank.acquire([]).tolist() == [ABSENT] * N_EXPERTS
        assert stats == Counters()
        bank.check_integrity()

    def test_the_table(self, store):
        bank, _ = make_bank(store, memory_reader(store))
        table = bank.acquire([6, 2])
        assert (table.dtype, table.shape) == (np.int32, (N_EXPERTS,))
        assert sorted(table[[6, 2]].tolist() + [ABSENT] * 6) == sorted(table.tolist())
        assert len({*table[[6, 2]].tolist()}) == 2
        assert set(table[[6, 2]].tolist()) <= {0, 1, 2, 3}

    def test_fewer_slots_than_one_token_needs(self, store):
        with pytest.raises(ValueError, match="needs at least 3 slots, not 2"):
            make_bank(store, memory_reader(store), 2)


class TestOrder:
    def test_the_least_recently_used_goes(self, store):
        bank, _ = make_bank(store, memory_reader(store), 4)
        for experts in ([0], [1], [2], [3], [0], [4]):
            table = bank.acquire(experts)
        assert np.flatnonzero(table != ABSENT).tolist() == [0, 2, 3, 4]
        bank.acquire([5, 6])
        assert np.flatnonzero(table != ABSENT).tolist() == [0, 4, 5, 6]
        bank.acquire([0])
        bank.acquire([4])
        bank.acquire([1, 2])
        assert np.flatnonzero(table != ABSENT).tolist() == [0, 1, 2, 4]

    def test_what_is_asked_for_never_goes(self, store):
        bank, stats = make_bank(store, memory_reader(store), 3)
        bank.acquire([0, 1, 2])
        table = bank.acquire([0, 1, 3])
        assert np.flatnonzero(table != ABSENT).tolist() == [0, 1, 3]
        table = bank.acquire([4, 0, 5])
        assert np.flatnonzero(table != ABSENT).tolist() == [0, 4, 5]
        assert (stats.hits, stats.misses) == (3, 6)

    def test_a_full_bank_hits_always(self, store):
        bank, stats = make_bank(store, memory_reader(store), N_EXPERTS)
        for first in (*range(N_EXPERTS), *range(N_EXPERTS)):
            bank.acquire([first])
        assert (stats.hits, stats.misses) == (8, 8)
        assert sorted(bank.acquire([]).tolist()) == list(range(8))


class TestBytes:
    @pytest.mark.parametrize("widen", [False, True])
    @pytest.mark.parametrize(
        "preadv", [os.preadv, short_preadv(1), delayed_preadv(2, short_preadv(2))]
    )
    def test_slots_hold_the_records(self, store, preadv, widen):
        reader = ThreadReader(3, preadv)
        bank, _ = make_bank(store, reader, 4, widen=widen)
        for experts in ([0, 1, 2], [3, 1, 4], [7, 6, 5], [2], [0, 7]):
            assert_holds(bank, experts, widen=widen)
        reader.close()

    def test_arrays(self, store):
        bank, _ = make_bank(store, memory_reader(store), 5)
        arrays = bank.memory.weights
        assert list(arrays) == ["gate_proj.weight", "gate_proj.scales", "down_proj.weight"]
        assert [(a.dtype, a.shape) for a in arrays.values()] == [
            (mx.uint32, (5, 32, 32)),
            (mx.bfloat16, (5, 32, 3)),
            (mx.float16, (5, 5, 14)),
        ]
        bank, _ = make_bank(store, memory_reader(store), 5, widen=True)
        assert [a.dtype for a in bank.memory.weights.values()] == [
            mx.uint32,
            mx.float32,
            mx.float32,
        ]

    def test_arrays_are_never_replaced(self, store):
        bank, _ = make_bank(store, memory_reader(store), 3, widen=True)
        before = dict(bank.memory.weights)
        for experts in ([0, 1, 2], [3, 4, 5], [6, 7]):
            bank.acquire(experts)
        assert all(bank.memory.weights[name] is array for name, array in before.items())

    @pytest.mark.parametrize("dtype", ["BF16", "F16"])
    def test_every_16_bit_float_widens_exactly(self, tmp_path, dtype):
        layout = layer_layout(
            tensors=[TensorSpec("gate_proj.weight", dtype, (2**15,))], n_experts=2, top_k=2
        )
        bits = np.arange(2**16, dtype="<u2")
        folder = tmp_path / "tiny.flashmoe"
        contents = {"gate_proj.weight": bits.tobytes()}
        write_store(folder, [(layout, contents)], resident_contents())
        store = open_store(folder)
        reader = ThreadReader(2)
        bank, _ = make_bank(store, reader, 2, layout=layout, widen=True)
        table = bank.acquire([1, 0])
        reader.close()
        found = np.concatenate(
            [np.frombuffer(slot_bytes(bank, "gate_proj.weight", table[e]), "<u4") for e in (0, 1)]
        )
        expected = np.frombuffer(widened(dtype, bits.tobytes()), "<u4")
        exponent = 0x7F80 if dtype == "BF16" else 0x7C00
        finite = (bits & exponent) != exponent
        assert finite.sum() == (65_280 if dtype == "BF16" else 63_488)
        assert np.array_equal(found[finite], expected[finite])
        infinite = ((bits & exponent) == exponent) & ((bits & ~np.uint16(exponent) & 0x7FFF) == 0)
        assert found[infinite].tolist() == [0x7F800000, 0xFF800000]
        assert np.isnan(found[~finite & ~infinite].view("<f4")).all()


class TestFailure:
    def test_a_bad_sector(self, store):
        reader = memory_reader(store)
        bank, stats = make_bank(store, reader, 4)
        bank.acquire([0, 1, 2])
        reader.bad_offset = LAYOUT.record_offset(5) + 4200
        with pytest.raises(ReadError) as caught:
            bank.acquire([4, 5, 1])
        assert (caught.value.errno, caught.value.path) == (
            errno.EIO,
            str(store.file(LAYOUT.file)),
        )
        bank.check_integrity()
        table = bank.acquire([])
        assert table[[4, 5]].tolist() == [ABSENT, ABSENT]
        assert table[1] != ABSENT
        assert stats.bytes_read == 3 * STRIDE
        assert_holds(bank, [4, 1])
        reader.bad_offset = None
        assert_holds(bank, [4, 5, 1])
        assert_holds(bank, [0, 2])

    @pytest.mark.parametrize("widen", [False, True])
    def test_a_truncated_file(self, own_store, widen):
        path = own_store.file(LAYOUT.file)
        whole = path.read_bytes()
        reader = ThreadReader(2)
        bank, _ = make_bank(own_store, reader, 3, widen=widen)
        assert_holds(bank, [0, 1, 2], widen=widen)
        end = LAYOUT.record_offset(7) + 8200
        os.truncate(path, end)
        with pytest.raises(ReadError) as caught:
            bank.acquire([6, 7])
        assert (caught.value.offset, caught.value.errno) == (end, None)
        bank.check_integrity()
        assert bank.acquire([])[[6, 7]].tolist() == [ABSENT, ABSENT]
        assert_holds(bank, [6, 0, 5], widen=widen)
        path.write_bytes(whole)
        assert_holds(bank, [6, 7], widen=widen)
        reader.close()

    def test_a_closed_reader(self, store):
        reader = ThreadReader(1)
        bank, _ = make_bank(store, reader)
        bank.acquire([3])
        reader.close()
        with pytest.raises(ReadError, match="closed"):
            bank.acquire([4])
        bank.check_integrity()
        assert bank.acquire([3])[4] == ABSENT

    def test_a_missing_file(self, own_store):
        own_store.file(LAYOUT.file).unlink()
        reader = ThreadReader(1)
        bank, _ = make_bank(own_store, reader)
        with pytest.raises(ReadError) as caught:
            bank.acquire([0])
        assert caught.value.errno == errno.ENOENT
        bank.check_integrity()
        reader.close()

    def test_failing_again_and_again_loses_no_slot(self, store):
        reader = memory_reader(store)
        bank, _ = make_bank(store, reader, 3)
        reader.bad_offset = LAYOUT.record_offset(2)
        for first in (0, 1, 3, 4, 5, 6, 7):
            with pytest.raises(ReadError):
                bank.acquire([first, 2])
            bank.check_integrity()
        assert bank.acquire([]).tolist() == [ABSENT] * N_EXPERTS
        reader.bad_offset = None
        assert_holds(bank, [0, 1, 2])

    def test_more_experts_than_slots_loses_no_slot(self, store):
        bank, _ = make_bank(store, memory_reader(store), 3)
        bank.acquire([0])
        with pytest.raises(Exception):  # noqa: B017
            bank.acquire([0, 1, 2, 3])
        bank.check_integrity()
        assert_holds(bank, [0, 1, 2])


class TestFence:
    def test_a_pending_output_is_evaluated_before_its_slot_is_overwritten(self, store):
        bank, _ = make_bank(store, memory_reader(store), 3)
        weights = bank.memory.weights["gate_proj.weight"]
        table = bank.acquire([0])
        slot = int(table[0])
        output = weights[mx.array([slot])] + 0
        bank.uses(output)
        bank.acquire([1, 2, 3])
        assert table[0] == ABSENT
        assert slot in table[[1, 2, 3]]
        assert bytes(array_bytes(output)) == CONTENTS["gate_proj.weight"][:4096]

    def test_several_outputs(self, store):
        bank, _ = make_bank(store, memory_reader(store), 3, widen=True)
        scales = bank.memory.weights["gate_proj.scales"]
        outputs = []
        for expert in (0, 1, 2, 3, 4, 5, 6, 7):
            table = bank.acquire([expert])
            outputs.append(scales[mx.array([int(table[expert])])] * 1.0)
            bank.uses(outputs[-1])
        for expert, output in enumerate(outputs):
            content = record_parts(LAYOUT, CONTENTS, expert)["gate_proj.scales"]
            assert bytes(array_bytes(output)) == widened("BF16", content)

    def test_a_failed_read_does_not_lift_the_fence(self, store):
        reader = memory_reader(store)
        bank, _ = make_bank(store, reader, 3)
        weights = bank.memory.weights["gate_proj.weight"]
        table = bank.acquire([0, 1, 2])
        output = weights[mx.array([int(table[0])])] + 0
        bank.uses(output)
        reader.bad_offset = LAYOUT.record_offset(4) + READ_BYTES - 1
        with pytest.raises(ReadError):
            bank.acquire([3, 4, 5])
        assert bytes(array_bytes(output)) == CONTENTS["gate_proj.weight"][:4096]

    def test_outputs_are_let_go_when_every_access_hits(self, store):
        bank, _ = make_bank(store, memory_reader(store), N_EXPERTS)
        table = bank.acquire([0, 1, 2])
        weights = bank.memory.weights["gate_proj.weight"]
        mx.synchronize()
        before = mx.get_active_memory()
        for _ in range(300):
            bank.acquire([0, 1, 2])
            output = mx.broadcast_to(weights[mx.array(table[[0, 1, 2]])], (8, 3, 32, 32)) + 0
            bank.uses(output)
            mx.eval(output)
        del output
        # 300 outputs of 96 KiB; what one step holds is all that may be left.
        assert mx.get_active_memory() - before < 2 * 98_304


class TestIntegrity:
    @pytest.mark.parametrize(("expert", "slot"), [(5, 0), (0, 1), (0, ABSENT), (0, 4), (0, -2)])
    def test_a_corrupted_table_is_detected(self, store, expert, slot):
        bank, _ = make_bank(store, memory_reader(store), 4)
        table = bank.acquire([0, 1])
        bank.check_integrity()
        true = table.copy()
        slots = {0: int(table[0]), 1: int(table[1])}
        table[expert] = slots.get(slot, slot)
        with pytest.raises(FlashMoEError, match=r"switch_mlp: resident slots .* != 4 slots"):
            bank.check_integrity()
        table[:] = true
        bank.check_integrity()


def subsets(n_experts, most):
    return st.lists(st.integers(0, n_experts - 1), min_size=1, max_size=most, unique=True)


@settings(max_examples=60)
@given(
    st.integers(TOP_K, N_EXPERTS),
    st.lists(st.tuples(subsets(N_EXPERTS, TOP_K), st.booleans()), max_size=25),
    st.booleans(),
)
def test_any_sequence_of_accesses(store, n_slots, accesses, widen):
    """Against a plain list, least recently used first; a failed read may only lose experts."""
    reader = memory_reader(store)
    bank, stats = make_bank(store, reader, n_slots, widen=widen, policy=LRU)
    order, hits, misses = [], 0, 0
    for experts, fails in accesses:
        missing = [expert for expert in experts if expert not in order]
        hits += len(experts) - len(missing)
        misses += len(missing)
        if fails and missing:
            reader.bad_offset = LAYOUT.record_offset(missing[-1])
            with pytest.raises(ReadError):
                bank.acquire(experts)
            reader.bad_offset = None
            bank.check_integrity()
            table = bank.acquire([])
            assert all(table[expert] == ABSENT for expert in missing)
            lost = [expert for expert in order if table[expert] == ABSENT]
            assert len(lost) <= len(missing) and not set(lost) & set(experts)
            # A failed call counts as a use of those that were there.
            used = [expert for expert in experts if expert in order]
            order = [expert for expert in order if expert not in (*lost, *used)] + used
        else:
            while len(order) + len(missing) > n_slots:
                order.remove(next(expert for expert in order if expert not in experts))
            order = [expert for expert in order if expert not in experts] + experts
            table = bank.acquire(experts)
            bank.check_integrity()
            for expert in experts:
                content = record_parts(LAYOUT, CONTENTS, expert)["gate_proj.weight"]
                assert slot_bytes(bank, "gate_proj.weight", table[expert]) == content
        assert np.flatnonzero(table != ABSENT).tolist() == sorted(order)
        assert (stats.hits, stats.misses) == (hits, misses)
