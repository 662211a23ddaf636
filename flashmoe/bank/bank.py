"""A layer's bank: records come into its slots on demand, by prefetch and by a warm start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flashmoe.bank.arrivals import Arrival, Arrivals
from flashmoe.bank.eviction import LFU, Policy
from flashmoe.bank.meter import Meter
from flashmoe.bank.prefetch import PrefetchReads
from flashmoe.bank.slot_table import ABSENT, SlotTable
from flashmoe.bank.warm_start import WarmStart
from flashmoe.base.errors import FlashMoEError, ReadError
from flashmoe.io.reader import Reader, ReadRequest, Ticket
from flashmoe.store.layout import Unit
from flashmoe.store.reader import Store


class LayerBank(SlotTable):
    """The slots of one layer's records.

    `acquire` brings at most `step_records` distinct records in at a time, so a bank has at least
    that many slots (one token's needs), and results never depend on how many more it has.
    """

    def __init__(
        self,
        store: Store,
        unit: Unit,
        reader: Reader,
        meter: Meter,
        *,
        n_slots: int,
        widen: bool,
        policy: type[Policy] = LFU,
        most_slots: int | None = None,
    ) -> None:
        """`most_slots`: up to how many slots `resize` should be cheap, as `SlotMemory` says."""
        super().__init__(
            unit, meter, n_slots=n_slots, widen=widen, policy=policy, most_slots=most_slots
        )
        self._path = store.file(unit.file)
        self._reader = reader
        self._prefetch = PrefetchReads(reader)
        self._warm_start = WarmStart(reader, meter)
        self.prefetched = 0
        self.prefetched_used = 0
        # Prefetched records that nobody has asked for yet.
        self._unused: set[int] = set()

    def acquire(self, records: Sequence[int]) -> npt.NDArray[np.int32]:
        """Make up to `step_records` distinct records resident; returns the layer's slot table.

        The table [n_records] maps a record to its slot and is valid for `records` until the
        next call. Raises what `request` and its arrivals raise.
        """
        with self.request(records) as arrivals:
            while self.wait(arrivals):
                pass
        return self._slot_of

    def request(self, records: Sequence[int], *, apart: bool = False) -> Arrivals:
        """Start reading those of up to `step_records` distinct records that are not resident.

        Their slots are theirs, as `slots_of` tells, once they have landed, and until the next
        call. `apart`: each can land before the others. Raises ValueError for more records than
        `step_records`, and ReadError when a record cannot be read; the records that had not landed
        are then absent, and the bank stays usable.
        """
        self._check_open()
        if len(records) > self.step_records:
            raise ValueError(
                f"{len(records)} records at a time, but {self.step_records} is the most"
            )
        self._harvest()
        missing = [record for record in records if self._slot_of[record] == ABSENT]
        stride = self._unit.record.stride
        self._counters.hits += len(records) - len(missing)
        self._counters.misses += len(missing)
        self._counters.bytes_demanded += stride * len(records)
        if missing:
            self._evaluate_pending()
        self._count_prefetched(records, missing)
        if apart:
            self._counters.not_prefetched += sum(record not in self._prefetch for record in missing)
        self._warm_start.use(records)
        pinned = set(records)
        arrivals: list[Arrival] = []
        begun: list[tuple[Ticket, Arrival]] = []
        try:
            for row, record in enumerate(missing):
                if record in self._prefetch or record in self._warm_start:
                    coming = self._prefetch if record in self._prefetch else self._warm_start
                    ticket, arrival = coming.adopt(record)
                    if ticket is not None:
                        begun.append((ticket, arrival))
                        continue
                else:
                    arrival = self._arrival(record, self._demand_slot(pinned), row)
                arrivals.append(arrival)
        except BaseException:
            for ticket, arrival in begun:
                ticket.cancel()
                arrivals.append(arrival)
            try:
                self._reader.drain()
            finally:
                self._lose(arrivals)
            raise
        # In the order of the call: landing has none that would come again.
        for record in records:
            self._policy.use(record)
        return Arrivals(
            self._reader,
            arrivals,
            apart=apart,
            begun=begun,
            landed=self._land,
            lost=self._lose,
        )

    @property
    def can_prefetch(self) -> bool:
        """Whether `prefetch` does anything."""
        return not self.memory.staged

    def prefetch(self, records: Sequence[int]) -> None:
        """Start reading records that may be needed next, likeliest first, when nothing demanded
        waits to be read.

        They take the places of those that the policy would evict next. What an earlier call began
        and this one does not name is cancelled. Does nothing where records have to be widened as
        they land.
        """
        if self._closed or not self.can_prefetch:
            return
        self._harvest()
        self._lose(self._prefetch.drop(keep=records))
        # A demand takes slots back from prefetched records, not from warm-started ones.
        room = self._prefetch_room if len(self._warm_start) else len(records)
        wanted = self._not_coming(records)
        if not wanted or room <= 0:
            return
        self._evaluate_pending()
        for record in wanted[:room]:
            try:
                arrival = self._arrival(record, self._take_slot(set(records)), row=0)
            except LookupError:
                return  # all that could give way is prefetched itself, or on its way
            try:
                self._prefetch.begin(arrival)
            except ReadError:
                # When it is demanded, the failure is raised.
                self._lose([arrival])
                return
            self.prefetched += 1
            self._counters.prefetched += 1

    def warm_start(self, records: Sequence[int]) -> None:
        """Start reading records into free slots, in disk order, when nothing else waits to be
        read; of more than find room, those that come first in `records`.

        Does nothing where `prefetch` does not.
        """
        if self._closed or not self.can_prefetch:
            return
        self._warm_start.rank(records)
        self._begin_warm_start(records)

    def pause_warm_start(self, needed: Sequence[int]) -> None:
        """Give up for now the warm-start reads that have not begun; the others are resident then.

        The records `needed` are asked for by what happens meanwhile.
        """
        self._lose(self._warm_start.pause())
        self._warm_start.outlast()
        self._harvest()
        self._admit_warm_started()
        self._warm_start.use(needed)

    def resume_warm_start(self) -> None:
        """Go on with what `pause_warm_start` gave up, where slots are still free."""
        self._begin_warm_start(self._warm_start.paused)

    @property
    def warm_starting(self) -> bool:
        """Whether a warm start is still reading."""
        return len(self._warm_start) > 0

    def by_value(self) -> list[int]:
        """The records that are in a slot, those that would be evicted last first."""
        self._harvest()
        self._admit_warm_started()
        return self._policy.ranked()

    def wait(self, arrivals: Arrivals) -> list[int]:
        """The records that land next, as `Arrivals.land` says; the time counts as reading."""
        if not arrivals.coming:
            return []
        with self._clock.during("reading"):
            return arrivals.land()

    def residency(self) -> npt.NDArray[np.bool_]:
        """Which records [n_records] are in a slot now."""
        self._harvest()
        held: npt.NDArray[np.bool_] = self._slot_of != ABSENT
        return held

    def use(self, records: Sequence[int]) -> None:
        """Count the resident ones of `records` as used, in this order."""
        self._count_prefetched(records, ())
        for record in self.resident(records):
            self._policy.use(record)

    def resize(self, n_slots: int) -> None:
        """Have so many slots, one token's needs at least; the system has the others' memory.

        What the policy values least is evicted when there are fewer. `memory.resizes_in_place`
        says before whether kernels have to be bound anew. Not while records are requested.
        Raises ValueError for too few slots.
        """
        self._check_open()
        if n_slots < self.step_records:
            raise ValueError(
                f"{self._unit.name} needs at least {self.step_records} slots, not {n_slots}"
            )
        before = self.memory.n_slots
        if n_slots == before:
            return
        self._evaluate_pending()
        self.pause_warm_start(())
        self._take_in(*self._prefetch.finish())
        if n_slots < before:
            self._vacate(n_slots)
            self._free = [slot for slot in self._free if slot < n_slots]
        try:
            self.memory.resize(n_slots)
        finally:
            # Not as many as asked for when there was no memory.
            self._policy.resize(self.memory.n_slots)
            self._free[:0] = range(self.memory.n_slots - 1, before - 1, -1)
        self.resume_warm_start()

    def close(self) -> None:
        """Give the slots' memory back; nothing can be acquired afterwards."""
        self.stop_prefetch()
        self._pending.clear()
        self.memory.release()
        self._closed = True

    def stop_prefetch(self) -> None:
        """Give up what nobody has demanded and what has not begun."""
        self._lose(self._prefetch.drop(keep=()))
        self._lose(self._warm_start.drop())

    def check_integrity(self) -> None:
        """Raise FlashMoEError unless every slot is free, or holds or awaits just one record."""
        resident = self._slot_of[self._slot_of != ABSENT].tolist()
        early = self._prefetch.slots + self._warm_start.slots
        if sorted(resident + self._free + early) != list(range(self.memory.n_slots)):
            raise FlashMoEError(
                f"{self._unit.name}: resident slots {sorted(resident)} + free slots "
                f"{sorted(self._free)} + slots being read {sorted(early)} != "
                f"{self.memory.n_slots} slots"
            )

    def _arrival(self, record: int, slot: int, row: int) -> Arrival:
        place = self.memory.destination(slot, row)
        offset = self._unit.record_offset(record)
        return Arrival(record, slot, row, ReadRequest(self._path, offset, place))

    @property
    def _prefetch_room(self) -> int:
        """How many more records may be on their way undemanded: a token's needs must still fit."""
        return self.memory.n_slots - self.step_records - len(self._prefetch) - len(self._warm_start)

    def _not_coming(self, records: Sequence[int]) -> list[int]:
        """Those of `records` that are neither resident nor on their way."""
        coming = (self._prefetch, self._warm_start)
        return [
            record
            for record in records
            if self._slot_of[record] == ABSENT and not any(record in reads for reads in coming)
        ]

    def _begin_warm_start(self, records: Sequence[int]) -> None:
        room = max(0, min(len(self._free), self._prefetch_room))
        wanted = self._not_coming(records)[:room]
        if wanted:
            self._evaluate_pending()
        for record in sorted(wanted):
            arrival = self._arrival(record, self._free.pop(), row=0)
            try:
                self._warm_start.begin(arrival)
            except ReadError:
                # When it is demanded, the failure is raised.
                self._lose([arrival])
                return

    def _harvest(self) -> None:
        if len(self._warm_start):
            whole, failed = self._warm_start.harvest()
            self._land(whole)
            self._lose(failed)
            if not len(self._warm_start):
                self._admit_warm_started()
        if len(self._prefetch):
            self._take_in(*self._prefetch.harvest())

    def _take_in(self, whole: Sequence[Arrival], failed: Sequence[Arrival]) -> None:
        """Count prefetched records as resident, and forget those that failed."""
        # A prompt may have brought the same record meanwhile.
        twice = [arrival for arrival in whole if self._slot_of[arrival.record] != ABSENT]
        self._free.extend(arrival.slot for arrival in twice)
        self._counters.bytes_read += len(twice) * self._unit.record.stride
        self._counters.bytes_wasted += len(twice) * self._unit.record.stride
        whole = [arrival for arrival in whole if arrival not in twice]
        self._land(whole)
        for arrival in whole:
            self._policy.use(arrival.record)
            self._unused.add(arrival.record)
        self._lose(failed)

    def _count_prefetched(self, records: Sequence[int], missing: Sequence[int]) -> None:
        """Note which prefetched records were of use: landed and unused so far, or on their way."""
        early = self._unused.intersection(records)
        self._unused -= early
        right = len(early) + sum(record in self._prefetch for record in missing)
        self._counters.bytes_absent += self._unit.record.stride * (len(early) + len(missing))
        self.prefetched_used += right
        self._counters.prefetched_used += right

    def _land(self, arrivals: Sequence[Arrival]) -> None:
        for arrival in arrivals:
            self.memory.widen(arrival.slot, arrival.row)
            self._slot_of[arrival.record] = arrival.slot
            self._counters.bytes_read += self._unit.record.stride

    def _take_slot(self, pinned: set[int]) -> int:
        if self._free:
            return self._free.pop()
        # What is needed now goes before what may be needed.
        arrival = self._warm_start.give_up(pinned)
        if arrival is not None:
            return arrival.slot
        self._admit_warm_started()
        return self._evict(pinned)

    def _demand_slot(self, pinned: set[int]) -> int:
        """As `_take_slot`, or else the slot of a prefetched record that nobody asked for."""
        try:
            return self._take_slot(pinned)
        except LookupError:
            with self._clock.during("reading"):
                found = self._prefetch.give_up(pinned)
            if found is None:
                raise
        arrival, whole = found
        if whole:
            self._counters.bytes_read += self._unit.record.stride
            self._counters.bytes_wasted += self._unit.record.stride
        return arrival.slot

    def _admit_warm_started(self) -> None:
        # All at once, so that they give way in order of value, not of where they are on disk.
        for record in self._warm_start.take_landed():
            if record not in self._policy:
                self._policy.use(record)

    def _evicted(self, victim: int) -> None:
        if victim in self._unused:
            self._unused.discard(victim)
            self._counters.bytes_wasted += self._unit.record.stride
        self._warm_start.forget(victim)
