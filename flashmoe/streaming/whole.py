"""Reading whole layers, as would be without routing: what the rest is measured against."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from flashmoe.bank.bank import LayerBank
from flashmoe.bank.slot_memory import SlotMemory
from flashmoe.bank.stats import Stats
from flashmoe.io.reader import Reader, ReadRequest
from flashmoe.store.layout import LayerLayout


class WholeLayer:
    """Reads the records of a layer that a call does not need, into memory for one of them."""

    def __init__(
        self, path: Path, layer: LayerLayout, reader: Reader, stats: Stats, bank: LayerBank
    ) -> None:
        self._path = path
        self._layer = layer
        self.reader = reader
        self._stats = stats
        self._bank = bank
        self._memory = SlotMemory(layer.record, 1, 1, widen=False)

    def __call__(self, needed: Collection[int]) -> None:
        """Empty the bank and read all records but those of `needed`, each once the one before
        is there.

        Raises ReadError when a record cannot be read.
        """
        held = self._bank.held()
        self._bank.make_room(dict.fromkeys(held, 0), len(held))
        for expert in range(self._layer.n_experts):
            if expert not in needed:
                self._read(expert)

    def _read(self, expert: int) -> None:
        offset = self._layer.record_offset(expert)
        request = ReadRequest(self._path, offset, self._memory.destination(0, 0))
        try:
            with self._stats.clock.during("reading"):
                self.reader.submit([request]).wait()
        except BaseException:
            # Nobody may go on writing to what the next record is read into.
            self.reader.drain()
            raise
        self._stats.bytes_read += self._layer.record.stride

    def close(self) -> None:
        """Give the memory back."""
        self._memory.release()
