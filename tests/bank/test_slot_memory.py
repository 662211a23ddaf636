"""Slot memory: where it lies, and that kernels see what is written to it."""

import math
import mmap

import mlx.core as mx
import numpy as np
import pytest

from flashmoe.bank.slot_memory import SlotMemory, staging_bytes
from flashmoe.base.dtypes import shared_bytes
from flashmoe.io.reader import address_of
from flashmoe.store.layout import TensorSpec
from tests.support.stores import layer_layout

BLOCK = 4096
TENSORS = [
    TensorSpec("gate_proj.weight", "U32", (64, 32)),  # two blocks
    TensorSpec("gate_proj.scales", "BF16", (64, 4)),  # an eighth of one
    TensorSpec("down_proj.weight", "U32", (8, 96)),  # three quarters of one
]
N_SLOTS = 5


@pytest.fixture
def record():
    return layer_layout(tensors=TENSORS, n_experts=8, top_k=3).record


@pytest.mark.parametrize("widen", [False, True])
def test_arrays_begin_on_blocks_and_are_row_contiguous(record, widen):
    for n_slots in (1, 3, 5, 1000):
        memory = SlotMemory(record, n_slots, 3, widen)
        for array in memory.weights.values():
            view = memoryview(array)
            assert view.c_contiguous
            assert address_of(shared_bytes(array)) % BLOCK == 0
            # What kernels ask for when they need a row-contiguous array copies nothing.
            contiguous = mx.contiguous(array)
            mx.eval(contiguous)
            assert address_of(shared_bytes(contiguous)) == address_of(shared_bytes(array))
            assert not np.array(array.view(mx.uint8)).any()


@pytest.mark.parametrize("widen", [False, True])
def test_what_is_written_is_what_a_kernel_reads(record, widen):
    memory = SlotMemory(record, N_SLOTS, 3, widen)
    rng = np.random.default_rng(0)
    expected = {}
    for slot in range(N_SLOTS):
        destination = memory.destination(slot, 0)
        last = record.components[-1]
        assert destination.nbytes == last.offset + last.nbytes
        # Floats between 1 and 2, whatever else: 0x3F80 to 0x3FFF in bfloat16.
        content = rng.integers(0x3F80, 0x4000, destination.nbytes // 2, np.uint16).view(np.uint8)
        done = 0
        for buffer in destination:
            buffer[:] = content[done : done + len(buffer)].data
            done += len(buffer)
        memory.widen(slot, 0)
        for component in record.components:
            part = content[component.offset : component.offset + component.nbytes]
            expected[component.name, slot] = part
    for (name, slot), part in expected.items():
        array = memory.weights[name]
        found = mx.take(array, mx.array([slot]), axis=0)
        if array.dtype == mx.float32:
            found = found.astype(mx.bfloat16)
        assert np.array_equal(np.array(found.view(mx.uint8)).reshape(-1), part), (name, slot)


def test_where_reads_can_go_straight(record):
    memory = SlotMemory(record, N_SLOTS, 3, widen=True)
    for slot in range(N_SLOTS):
        (
            weight,
            scales,
            _,
        ) = memory.destination(slot, slot % 3)
        # The slots of a component of whole blocks, and staging rows with the padding behind them.
        assert address_of(weight) % BLOCK == 0
        assert (address_of(scales) % BLOCK, len(scales)) == (0, BLOCK)
    assert staging_bytes(record, widen=True) == BLOCK
    assert staging_bytes(record, widen=False) == 0
    assert mmap.PAGESIZE % BLOCK == 0


def test_destinations_are_kept_when_nothing_is_staged(record):
    memory = SlotMemory(record, N_SLOTS, 3, widen=False)
    assert memory.destination(2, 0) is memory.destination(2, 1)
    assert memory.destination(2, 0) is not memory.destination(3, 0)
    staged = SlotMemory(record, N_SLOTS, 3, widen=True)
    assert staged.destination(2, 0)[1].obj is staged.destination(2, 1)[1].obj
    rows = {address_of(staged.destination(2, row)[1]) for row in range(3)}
    assert len(rows) == 3


def test_memory_is_given_back(record):
    mx.synchronize()
    before = mx.get_active_memory()
    memory = SlotMemory(record, 1000, 3, widen=False)
    memory.destination(7, 0)
    held = mx.get_active_memory() - before
    wanted = 1000 * sum(math.prod(t.shape) * (2 if t.dtype == "BF16" else 4) for t in TENSORS)
    # A block for each array to begin on one, and the allocator's own rounding.
    assert wanted <= held <= wanted + len(TENSORS) * (BLOCK + 16_384)
    memory.release()
    assert mx.get_active_memory() == before
