"""One layer's bank over a tiny store, and what its slots must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flashmoe.bank.bank import LayerBank
from flashmoe.bank.meter import Meter
from flashmoe.base.dtypes import array_bytes
from flashmoe.io.reader import Priority
from flashmoe.store.reader import Store, open_store
from tests.support.readers import MemoryReader
from tests.support.stores import (
    layer_contents,
    layer_layout,
    record_parts,
    resident_contents,
    write_store,
)

N_EXPERTS = 8
TOP_K = 3
LAYOUT = layer_layout(n_experts=N_EXPERTS, top_k=TOP_K)
CONTENTS = layer_contents(LAYOUT, seed=5)
# Random bytes are NaN now and then; clearing an exponent bit makes every 16-bit float finite.
for name, mask in (("gate_proj.scales", 0xBFFF), ("down_proj.weight", 0xBFFF)):
    CONTENTS[name] = (np.frombuffer(CONTENTS[name], "<u2") & mask).tobytes()
STRIDE = LAYOUT.record.stride
# What a read covers: the record without the padding behind its last component.
READ_BYTES = 8192 + 140


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_bank_store(tmp_path_factory.mktemp("bank"))


def write_bank_store(folder: Path) -> Store:
    """A store of one layer, LAYOUT with CONTENTS."""
    path = folder / "tiny.flashmoe"
    write_store(path, [(LAYOUT, CONTENTS)], resident_contents())
    return open_store(path)


def memory_reader(store):
    path = store.file(LAYOUT.file)
    return MemoryReader({path: path.read_bytes()})


def make_bank(store, reader, n_slots=4, *, layout=LAYOUT, widen=False, **options):
    meter = Meter()
    bank = LayerBank(store, layout.unit, reader, meter, n_slots=n_slots, widen=widen, **options)
    return bank, meter.counters


def slot_bytes(bank, name, slot):
    """What a kernel finds in one slot of a component."""
    return bytes(array_bytes(bank.memory.weights[name][slot]))


def widened(dtype, content):
    """MLX's own conversion of 16-bit floats to float32, as bytes."""
    bits = mx.array(np.frombuffer(content, "<u2"))
    kind = mx.bfloat16 if dtype == "BF16" else mx.float16
    return bytes(array_bytes(bits.view(kind).astype(mx.float32)))


def assert_holds(bank, experts, *, widen=False):
    table = bank.acquire(experts)
    for expert in experts:
        parts = record_parts(LAYOUT, CONTENTS, expert)
        for component in LAYOUT.record.components:
            content = parts[component.name]
            if widen and component.dtype in ("BF16", "F16"):
                content = widened(component.dtype, content)
            assert slot_bytes(bank, component.name, table[expert]) == content
    bank.check_integrity()
    return table


class Slow(MemoryReader):
    """Prefetch batches end when the test lets them, and can be cancelled until they begin."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.waiting: list[SlowTicket] = []

    def submit(self, requests: Any, priority: Priority = Priority.DEMAND) -> Any:
        if priority == Priority.DEMAND:
            return super().submit(requests, priority)
        ticket = SlowTicket(super().submit, requests)
        self.waiting.append(ticket)
        return ticket


class SlowTicket:
    def __init__(self, submit: Any, requests: Any) -> None:
        self._submit, self._requests, self._inner = submit, requests, None
        self.begun = self.dropped = False

    def end(self) -> None:
        if not self.dropped and self._inner is None:
            self._inner = self._submit(self._requests)

    def done(self) -> bool:
        return self.dropped or self._inner is not None

    def cancel(self) -> int:
        if self.begun or self.done():
            return 0
        self.dropped = True
        return 1

    def wait(self) -> None:
        self.end()
        assert self._inner is not None
        self._inner.wait()


def slow(store: Store, bad_offset: int | None = None) -> Slow:
    path = store.file(LAYOUT.file)
    return Slow({path: path.read_bytes()}, bad_offset)
