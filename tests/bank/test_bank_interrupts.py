"""An interrupt between submitting reads and waiting for them: nobody writes to a free slot."""

import pytest

from flashmoe.bank.bank import LayerBank
from flashmoe.bank.meter import Meter
from flashmoe.bank.slot_table import ABSENT
from flashmoe.base.dtypes import array_bytes
from flashmoe.store.reader import open_store
from tests.support.reader_cases import POOLS
from tests.support.readers import delayed_preadv
from tests.support.stores import layer_contents, layer_layout, resident_contents, write_store


@pytest.mark.parametrize("pool", POOLS)
def test_an_interrupt_before_the_wait(tmp_path, monkeypatch, pool):
    layout = layer_layout(n_experts=8, top_k=3)
    contents = layer_contents(layout, seed=5)
    write_store(tmp_path / "store", [(layout, contents)], resident_contents())
    reader = POOLS[pool](1, delayed_preadv(1))
    bank = LayerBank(
        open_store(tmp_path / "store"), layout.unit, reader, Meter(), n_slots=3, widen=False
    )
    tickets = []
    submit = reader.submit

    def interrupted(requests):
        tickets.append(submit(requests))
        raise KeyboardInterrupt

    for _ in range(10):
        with monkeypatch.context() as patched:
            patched.setattr(reader, "submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                bank.acquire([0, 1, 2])
        assert tickets[-1].done()
        assert bank.acquire([]).tolist() == [ABSENT] * 8
        bank.check_integrity()
    table = bank.acquire([3, 4, 5])
    size = len(contents["gate_proj.weight"]) // 8
    for expert in (3, 4, 5):
        held = bytes(array_bytes(bank.memory.weights["gate_proj.weight"][int(table[expert])]))
        assert held == contents["gate_proj.weight"][expert * size : (expert + 1) * size]
    reader.close()
