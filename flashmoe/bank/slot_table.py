"""Which record is in which slot of a layer's bank, and which gives way.

Fencing: a kernel's output is lazy and reads its slots when it is evaluated. The table is told of
every output (`uses`) and evaluates those that are pending before any slot is overwritten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe.bank.arrivals import Arrival
from flashmoe.bank.eviction import Policy
from flashmoe.bank.meter import Meter
from flashmoe.bank.slot_memory import SlotMemory
from flashmoe.base.errors import FlashMoEError
from flashmoe.store.layout import Unit

ABSENT = -1


class SlotTable:
    """The slots of one MoE layer and what they hold; at least one token's needs of them."""

    def __init__(
        self,
        unit: Unit,
        meter: Meter,
        *,
        n_slots: int,
        widen: bool,
        policy: type[Policy],
        most_slots: int | None,
    ) -> None:
        self.step_records = unit.step_records
        self.record_bytes = unit.record.stride
        self.n_records = unit.n_records
        if n_slots < self.step_records:
            raise ValueError(f"{unit.name} needs at least {self.step_records} slots, not {n_slots}")
        self.memory = SlotMemory(unit.record, n_slots, self.step_records, widen, most_slots)
        self._unit = unit
        self._counters, self._clock = meter.counters, meter.clock
        self._policy = policy(n_slots)
        self._slot_of = np.full(unit.n_records, ABSENT, np.int32)
        self._free = list(range(n_slots - 1, -1, -1))
        self._pending: list[mx.array] = []
        self._closed = False

    def resident(self, records: Sequence[int]) -> list[int]:
        """Those of `records` that are in a slot."""
        return [record for record in records if self._slot_of[record] != ABSENT]

    def slots_of(self, records: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        """The slots of resident records, in the array's shape."""
        slots: npt.NDArray[np.int32] = self._slot_of[records]
        return slots

    def uses(self, output: mx.array) -> None:
        """Note an unevaluated array that reads slots of this bank.

        At most one is kept: the one before has normally been evaluated by now, and is otherwise.
        """
        self._evaluate_pending()
        self._pending.append(output)

    @property
    def n_free(self) -> int:
        """Slots that hold no record."""
        return len(self._free)

    @property
    def holds_all(self) -> bool:
        """Whether every record of the layer is in a slot."""
        return bool((self._slot_of != ABSENT).all())

    def held(self) -> list[int]:
        """All records that are in a slot."""
        records: list[int] = np.flatnonzero(self._slot_of != ABSENT).tolist()
        return records

    def slot_table(self) -> npt.NDArray[np.int32]:
        """The slot of each record [n_records], or ABSENT, as it is now.

        Raises FlashMoEError once the bank is closed.
        """
        self._check_open()
        return self._slot_of.copy()

    def make_room(self, uses: Mapping[int, int], count: int) -> None:
        """Evict `count` of the resident records, which `uses` covers: those with the lowest
        value, and of equal ones those that the policy would."""
        for level in sorted(set(uses.values())):
            pinned = {record for record in uses if uses[record] != level}
            for _ in range(min(count, len(uses) - len(pinned))):
                self._free.append(self._evict(pinned))
                count -= 1

    def adopt(self, record: int, source: SlotMemory, slot: int) -> None:
        """Copy an absent record out of another memory's slot into a free one."""
        self._evaluate_pending()
        own = self._free.pop()
        try:
            self.memory.copy_slot(own, source, slot)
            self._policy.use(record)
            self._slot_of[record] = own
        except BaseException:
            self._free.append(own)
            raise

    def _vacate(self, n_slots: int) -> None:
        """Leave `n_slots` records at most, and these in the first slots."""
        for _ in range(len(self.held()) - n_slots):
            self._free.append(self._evict(set()))
        low = [slot for slot in self._free if slot < n_slots]
        for record in np.flatnonzero(self._slot_of >= n_slots).tolist():
            old, new = int(self._slot_of[record]), low.pop()
            self.memory.copy_slot(new, self.memory, old)
            self._slot_of[record] = new
            self._free[self._free.index(new)] = old

    def _check_open(self) -> None:
        if self._closed:
            raise FlashMoEError("the model is closed; load it again with from_pretrained")

    def _lose(self, arrivals: Sequence[Arrival]) -> None:
        # Whatever the slots hold now belongs to nobody.
        for arrival in arrivals:
            self._free.append(arrival.slot)
            if arrival.record in self._policy:
                self._policy.forget(arrival.record)

    def _evaluate_pending(self) -> None:
        if self._pending:
            with self._clock.during("computing"):
                mx.eval(self._pending)
            self._pending.clear()

    def _evict(self, pinned: set[int]) -> int:
        """The slot of a record that is no longer resident, none of `pinned`."""
        victim = self._policy.victim(pinned)
        self._evicted(victim)
        slot = int(self._slot_of[victim])
        self._slot_of[victim] = ABSENT
        return slot

    def _evicted(self, victim: int) -> None:
        """Told of every record that is evicted."""
