"""A layer's bank: which expert is in which slot, and getting the missing ones in.

Fencing: a kernel's output is lazy and reads its slots when it is evaluated. The bank is told of
every output (`uses`) and evaluates those that are pending before it overwrites any slot.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe.errors import FlashMoEError, ReadError
from flashmoe.io.reader import Reader, ReadRequest
from flashmoe.store.layout import LayerLayout
from flashmoe.store.reader import Store
from flashmoe.streaming.policy.select import make_policy
from flashmoe.streaming.slots import SlotMemory
from flashmoe.streaming.telemetry import Stats

ABSENT = -1


class LayerBank:
    """The slots of one MoE layer.

    `acquire` brings at most `group` distinct experts in at a time, so a bank has at least that
    many slots (one token's needs) and results never depend on how many more it has.
    """

    def __init__(
        self,
        store: Store,
        layer: LayerLayout,
        reader: Reader,
        stats: Stats,
        *,
        n_slots: int,
        widen: bool,
        policy: str = "auto",
    ) -> None:
        self.group = layer.top_k
        if n_slots < self.group:
            raise ValueError(f"{layer.path} needs at least {self.group} slots, not {n_slots}")
        self.memory = SlotMemory(layer.record, n_slots, self.group, widen)
        self._path = store.file(layer.file)
        self._layer = layer
        self._reader = reader
        self._stats = stats
        self._policy = make_policy(policy, n_slots)
        self._slot_of = np.full(layer.n_experts, ABSENT, np.int32)
        self._free = list(range(n_slots - 1, -1, -1))
        self._pending: list[mx.array] = []
        self._closed = False

    def acquire(self, experts: Sequence[int]) -> npt.NDArray[np.int32]:
        """Make up to `group` distinct experts resident; returns the layer's slot table.

        The table [n_experts] maps an expert to its slot and is valid for `experts` until the
        next call. Raises ValueError for more experts than `group`, and ReadError when a record
        cannot be read whole; the experts that were being read are then absent, and the bank
        stays usable.
        """
        if self._closed:
            raise FlashMoEError("the model is closed; load it again with from_pretrained")
        if len(experts) > self.group:
            raise ValueError(f"{len(experts)} experts at a time, but {self.group} is the most")
        missing = [expert for expert in experts if self._slot_of[expert] == ABSENT]
        stride = self._layer.record.stride
        self._stats.hits += len(experts) - len(missing)
        self._stats.misses += len(missing)
        self._stats.bytes_demanded += stride * len(experts)
        if missing:
            self._bring(missing, pinned=set(experts))
            self._stats.bytes_read += stride * len(missing)
        for expert in experts:
            self._policy.use(expert)
        return self._slot_of

    def uses(self, output: mx.array) -> None:
        """Note an unevaluated array that reads slots of this bank.

        At most one is kept: the one before has normally been evaluated by now, and is otherwise.
        """
        self._settle_pending()
        self._pending.append(output)

    def close(self) -> None:
        """Give the slots' memory back; nothing can be acquired afterwards."""
        self._pending.clear()
        self.memory.release()
        self._closed = True

    def check_integrity(self) -> None:
        """Raise FlashMoEError unless every slot is either free or holds exactly one expert."""
        resident = self._slot_of[self._slot_of != ABSENT].tolist()
        if sorted(resident + self._free) != list(range(self.memory.n_slots)):
            raise FlashMoEError(
                f"{self._layer.path}: resident slots {sorted(resident)} + free slots "
                f"{sorted(self._free)} != {self.memory.n_slots} slots"
            )

    def _bring(self, missing: list[int], pinned: set[int]) -> None:
        self._settle_pending()
        started = time.perf_counter()
        slots: list[int] = []
        requests = []
        try:
            for row, expert in enumerate(missing):
                slots.append(self._take_slot(pinned))
                destination = self.memory.destination(slots[-1], row)
                offset = self._layer.record_offset(expert)
                requests.append(ReadRequest(self._path, offset, destination))
            self._reader.submit(requests).wait()
            self.memory.settle(slots)
        except BaseException as error:
            # Whatever the slots hold now belongs to nobody, once nobody writes to them: an
            # interrupt may have come between submitting and waiting.
            if not isinstance(error, ReadError):
                self._reader.drain()
            self._free.extend(slots)
            raise
        self._slot_of[missing] = slots
        self._stats.seconds.reading += time.perf_counter() - started

    def _settle_pending(self) -> None:
        if self._pending:
            started = time.perf_counter()
            mx.eval(self._pending)
            self._pending.clear()
            self._stats.seconds.computing += time.perf_counter() - started

    def _take_slot(self, pinned: set[int]) -> int:
        if self._free:
            return self._free.pop()
        victim = self._policy.victim(pinned)
        slot = int(self._slot_of[victim])
        self._slot_of[victim] = ABSENT
        return slot
