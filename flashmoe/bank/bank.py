"""A layer's bank: getting experts into its slots, as they are demanded and ahead of that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flashmoe.bank.arrivals import Arrival, Arrivals
from flashmoe.bank.prefetch import ReadAhead
from flashmoe.bank.slot_table import ABSENT, SlotTable
from flashmoe.bank.stats import Stats
from flashmoe.bank.warm_start import Preload
from flashmoe.base.errors import FlashMoEError, ReadError
from flashmoe.io.reader import Reader, ReadRequest, Ticket
from flashmoe.store.layout import LayerLayout
from flashmoe.store.reader import Store


class LayerBank(SlotTable):
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
        most_slots: int | None = None,
    ) -> None:
        """`most_slots`: up to how many slots `resize` should be cheap, as `SlotMemory` says."""
        super().__init__(
            layer, stats, n_slots=n_slots, widen=widen, policy=policy, most_slots=most_slots
        )
        self._path = store.file(layer.file)
        self._reader = reader
        self._ahead = ReadAhead(reader)
        self._preload = Preload(reader, stats)
        self.guessed = 0
        self.guessed_right = 0
        # Experts that were read ahead and have not been asked for since.
        self._unused: set[int] = set()

    def acquire(self, experts: Sequence[int]) -> npt.NDArray[np.int32]:
        """Make up to `group` distinct experts resident; returns the layer's slot table.

        The table [n_experts] maps an expert to its slot and is valid for `experts` until the
        next call. Raises what `request` and its arrivals raise.
        """
        with self.request(experts) as arrivals:
            while self.wait(arrivals):
                pass
        return self._slot_of

    def request(self, experts: Sequence[int], *, apart: bool = False) -> Arrivals:
        """Start reading those of up to `group` distinct experts that are not resident.

        Their slots are theirs, as `slots_of` tells, once they have landed, and until the next
        call. `apart`: each can land before the others. Raises ValueError for more experts than
        `group`, and ReadError when a record cannot be read; the experts that had not landed are
        then absent, and the bank stays usable.
        """
        self._check_open()
        if len(experts) > self.group:
            raise ValueError(f"{len(experts)} experts at a time, but {self.group} is the most")
        self._harvest()
        missing = [expert for expert in experts if self._slot_of[expert] == ABSENT]
        stride = self._layer.record.stride
        self._stats.hits += len(experts) - len(missing)
        self._stats.misses += len(missing)
        self._stats.bytes_demanded += stride * len(experts)
        if missing:
            self._settle_pending()
        self._count_guesses(experts, missing)
        if apart:
            self._stats.unguessed += sum(expert not in self._ahead for expert in missing)
        self._preload.use(experts)
        pinned = set(experts)
        arrivals: list[Arrival] = []
        begun: list[tuple[Ticket, Arrival]] = []
        try:
            for row, expert in enumerate(missing):
                if expert in self._ahead or expert in self._preload:
                    coming = self._ahead if expert in self._ahead else self._preload
                    ticket, arrival = coming.adopt(expert)
                    if ticket is not None:
                        begun.append((ticket, arrival))
                        continue
                else:
                    arrival = self._arrival(expert, self._demand_slot(pinned), row)
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
        for expert in experts:
            self._policy.use(expert)
        return Arrivals(
            self._reader,
            arrivals,
            apart=apart,
            begun=begun,
            landed=self._land,
            lost=self._lose,
        )

    @property
    def reads_ahead(self) -> bool:
        """Whether `read_ahead` does anything."""
        return not self.memory.staged

    def read_ahead(self, experts: Sequence[int]) -> None:
        """Start reading experts that may be needed next, likeliest first, when nothing demanded
        waits to be read.

        They take the places of those that the policy would evict next. What was begun for an
        earlier guess and is not among these is cancelled. Does nothing where records have to be
        widened as they land.
        """
        if self._closed or not self.reads_ahead:
            return
        self._harvest()
        self._lose(self._ahead.drop(keep=experts))
        # A demand takes slots back from guesses, but not from what is preloaded.
        room = self._room_ahead if len(self._preload) else len(experts)
        wanted = self._not_coming(experts)
        if not wanted or room <= 0:
            return
        self._settle_pending()
        for expert in wanted[:room]:
            try:
                arrival = self._arrival(expert, self._take_slot(set(experts)), row=0)
            except LookupError:
                return  # all that could give way is guessed itself, or on its way
            try:
                self._ahead.begin(arrival)
            except ReadError:
                # When it is demanded, the failure is raised.
                self._lose([arrival])
                return
            self.guessed += 1
            self._stats.guessed += 1

    def preload(self, experts: Sequence[int]) -> None:
        """Start reading experts into free slots, in disk order, when nothing else waits to be
        read; of more than find room, those that come first in `experts`.

        Does nothing where `read_ahead` does not.
        """
        if self._closed or not self.reads_ahead:
            return
        self._preload.rank(experts)
        self._begin_preload(experts)

    def pause_preload(self, needed: Sequence[int]) -> None:
        """Give up for now what has not begun to be preloaded; what has is resident afterwards.

        The experts `needed` are asked for by what happens meanwhile.
        """
        self._lose(self._preload.pause())
        self._preload.outlast()
        self._harvest()
        self._admit_preloaded()
        self._preload.use(needed)

    def resume_preload(self) -> None:
        """Go on with what `pause_preload` gave up, where slots are still free."""
        self._begin_preload(self._preload.paused)

    @property
    def preloads(self) -> bool:
        """Whether records are being preloaded."""
        return len(self._preload) > 0

    def read_with(self, reader: Reader) -> None:
        """Read with another reader from now on, the one of before being at rest. Not while
        experts are requested."""
        self._check_open()
        self.pause_preload(())
        self._take_in(*self._ahead.finish())
        self._reader = reader
        self._ahead = ReadAhead(reader)
        self._preload.read_with(reader)
        self.resume_preload()

    def by_value(self) -> list[int]:
        """The experts that are in a slot, those that would be evicted last first."""
        self._harvest()
        self._admit_preloaded()
        return self._policy.ranked()

    def wait(self, arrivals: Arrivals) -> list[int]:
        """The experts that land next, as `Arrivals.land` says; the time counts as reading."""
        if not arrivals.coming:
            return []
        with self._stats.clock.during("reading"):
            return arrivals.land()

    def residency(self) -> npt.NDArray[np.bool_]:
        """Which experts [n_experts] are in a slot now."""
        self._harvest()
        held: npt.NDArray[np.bool_] = self._slot_of != ABSENT
        return held

    def use(self, experts: Sequence[int]) -> None:
        """Count the resident ones of `experts` as used, in this order."""
        self._count_guesses(experts, ())
        for expert in self.resident(experts):
            self._policy.use(expert)

    def resize(self, n_slots: int) -> None:
        """Have so many slots, one token's needs at least; the system has the others' memory.

        What the policy values least is evicted when there are fewer. `memory.resizes_in_place`
        says before whether kernels have to be bound anew. Not while experts are requested.
        Raises ValueError for too few slots.
        """
        self._check_open()
        if n_slots < self.group:
            raise ValueError(f"{self._layer.path} needs at least {self.group} slots, not {n_slots}")
        before = self.memory.n_slots
        if n_slots == before:
            return
        self._settle_pending()
        self.pause_preload(())
        self._take_in(*self._ahead.finish())
        if n_slots < before:
            self._vacate(n_slots)
            self._free = [slot for slot in self._free if slot < n_slots]
        try:
            self.memory.resize(n_slots)
        finally:
            # Not as many as asked for when there was no memory.
            self._policy.resize(self.memory.n_slots)
            self._free[:0] = range(self.memory.n_slots - 1, before - 1, -1)
        self.resume_preload()

    def close(self) -> None:
        """Give the slots' memory back; nothing can be acquired afterwards."""
        self.stop_reading_ahead()
        self._pending.clear()
        self.memory.release()
        self._closed = True

    def stop_reading_ahead(self) -> None:
        """Give up what nobody has demanded and what has not begun."""
        self._lose(self._ahead.drop(keep=()))
        self._lose(self._preload.drop())

    def check_integrity(self) -> None:
        """Raise FlashMoEError unless every slot is free, or holds or awaits just one expert."""
        resident = self._slot_of[self._slot_of != ABSENT].tolist()
        ahead = self._ahead.slots + self._preload.slots
        if sorted(resident + self._free + ahead) != list(range(self.memory.n_slots)):
            raise FlashMoEError(
                f"{self._layer.path}: resident slots {sorted(resident)} + free slots "
                f"{sorted(self._free)} + slots read ahead {sorted(ahead)} != "
                f"{self.memory.n_slots} slots"
            )

    def _arrival(self, expert: int, slot: int, row: int) -> Arrival:
        place = self.memory.destination(slot, row)
        offset = self._layer.record_offset(expert)
        return Arrival(expert, slot, row, ReadRequest(self._path, offset, place))

    @property
    def _room_ahead(self) -> int:
        """How many more records may be on their way undemanded: a token's needs must still fit."""
        return self.memory.n_slots - self.group - len(self._ahead) - len(self._preload)

    def _not_coming(self, experts: Sequence[int]) -> list[int]:
        """Those of `experts` that are neither resident nor on their way."""
        coming = (self._ahead, self._preload)
        return [
            expert
            for expert in experts
            if self._slot_of[expert] == ABSENT and not any(expert in reads for reads in coming)
        ]

    def _begin_preload(self, experts: Sequence[int]) -> None:
        room = max(0, min(len(self._free), self._room_ahead))
        wanted = self._not_coming(experts)[:room]
        if wanted:
            self._settle_pending()
        for expert in sorted(wanted):
            arrival = self._arrival(expert, self._free.pop(), row=0)
            try:
                self._preload.begin(arrival)
            except ReadError:
                # When it is demanded, the failure is raised.
                self._lose([arrival])
                return

    def _harvest(self) -> None:
        if len(self._preload):
            whole, failed = self._preload.harvest()
            self._land(whole)
            self._lose(failed)
            if not len(self._preload):
                self._admit_preloaded()
        if len(self._ahead):
            self._take_in(*self._ahead.harvest())

    def _take_in(self, whole: Sequence[Arrival], failed: Sequence[Arrival]) -> None:
        """Count records that were read ahead as resident, and forget those that failed."""
        # A prompt may have brought the same expert meanwhile.
        twice = [arrival for arrival in whole if self._slot_of[arrival.expert] != ABSENT]
        self._free.extend(arrival.slot for arrival in twice)
        self._stats.bytes_read += len(twice) * self._layer.record.stride
        self._stats.bytes_wasted += len(twice) * self._layer.record.stride
        whole = [arrival for arrival in whole if arrival not in twice]
        self._land(whole)
        for arrival in whole:
            self._policy.use(arrival.expert)
            self._unused.add(arrival.expert)
        self._lose(failed)

    def _count_guesses(self, experts: Sequence[int], missing: Sequence[int]) -> None:
        """Note which guesses came true: landed and not used yet, or still on their way."""
        early = self._unused.intersection(experts)
        self._unused -= early
        right = len(early) + sum(expert in self._ahead for expert in missing)
        self._stats.bytes_absent += self._layer.record.stride * (len(early) + len(missing))
        self.guessed_right += right
        self._stats.guessed_right += right

    def _land(self, arrivals: Sequence[Arrival]) -> None:
        for arrival in arrivals:
            self.memory.settle(arrival.slot, arrival.row)
            self._slot_of[arrival.expert] = arrival.slot
            self._stats.bytes_read += self._layer.record.stride

    def _take_slot(self, pinned: set[int]) -> int:
        if self._free:
            return self._free.pop()
        # What is needed now goes before what may be needed.
        arrival = self._preload.give_up(pinned)
        if arrival is not None:
            return arrival.slot
        self._admit_preloaded()
        return self._evict(pinned)

    def _demand_slot(self, pinned: set[int]) -> int:
        """As `_take_slot`, or else the slot of a wrong guess."""
        try:
            return self._take_slot(pinned)
        except LookupError:
            with self._stats.clock.during("reading"):
                found = self._ahead.give_up(pinned)
            if found is None:
                raise
        arrival, whole = found
        if whole:
            self._stats.bytes_read += self._layer.record.stride
            self._stats.bytes_wasted += self._layer.record.stride
        return arrival.slot

    def _admit_preloaded(self) -> None:
        # All at once, so that they give way in order of value, not of where they are on disk.
        for expert in self._preload.take_landed():
            if expert not in self._policy:
                self._policy.use(expert)

    def _evicted(self, victim: int) -> None:
        if victim in self._unused:
            self._unused.discard(victim)
            self._stats.bytes_wasted += self._layer.record.stride
        self._preload.forget(victim)
