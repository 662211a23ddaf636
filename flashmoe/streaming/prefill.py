"""Prompts: each needed record is read once per call, in disk order, while others compute.

Calls that need more experts than one token does come here. Experts that are in the bank compute
from their slots; the others pass through staging, one group being read while the other computes.
An expert meets all of its rows in one kernel call. Which experts share a call depends on the bank
and on staging, and kernels for prompts give a row the same bits in any such company.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe.bank.bank import LayerBank
from flashmoe.bank.meter import Meter
from flashmoe.bank.slot_memory import SlotMemory
from flashmoe.bank.slot_table import ABSENT
from flashmoe.base.dtypes import array_bytes, shared_bytes
from flashmoe.io.reader import Reader, ReadRequest, Ticket
from flashmoe.kernels.contract import ExpertForward
from flashmoe.store.layout import RecordLayout, Unit

Ints = npt.NDArray[np.int64]
# One group is read while the other computes.
N_GROUPS = 2
# Scattering rows needs their size only, not what they are.
_CARRIERS = {2: np.uint16, 4: np.uint32}


class Staging:
    """Two groups of `group_records` slots, shared by all layers whose records are laid out alike.

    Between calls nothing in it is of use to anybody.
    """

    def __init__(self, record: RecordLayout, group_records: int, widen: bool) -> None:
        self.group_records = group_records
        self.groups = tuple(
            SlotMemory(record, group_records, group_records, widen) for _ in range(N_GROUPS)
        )

    def release(self) -> None:
        """Forget the arrays."""
        for group in self.groups:
            group.release()


@dataclass(frozen=True)
class RoutedRows:
    """The rows of a call, one per routed (token, expert) pair, ordered by expert.

    `experts` [n] ascending, `counts` [n] rows of each, `order` the pairs' flat indices, an
    expert's next to each other and in order of tokens.
    """

    experts: Ints
    counts: Ints
    order: Ints

    @classmethod
    def of(cls, indices: npt.NDArray[Any]) -> RoutedRows:
        """The rows of routed indices [..., k]."""
        flat = indices.reshape(-1)
        experts, counts = np.unique(flat, return_counts=True)
        return cls(experts.astype(np.int64), counts, np.argsort(flat, kind="stable"))

    def split(self, chosen: Ints, most_experts: int, most_rows: int) -> list[Ints]:
        """`chosen` (positions in `experts`) in runs of at most so many experts and rows; an
        expert with more rows than that is a run of its own."""
        runs: list[list[int]] = []
        rows = 0
        for position, count in zip(chosen.tolist(), self.counts[chosen].tolist(), strict=True):
            if not runs or len(runs[-1]) == most_experts or rows + count > most_rows:
                runs.append([])
                rows = 0
            runs[-1].append(position)
            rows += count
        return [np.array(run, np.int64) for run in runs]

    def pairs(self, run: Ints) -> Ints:
        """The flat indices of all pairs of a run of positions, by expert."""
        ends = np.cumsum(self.counts)
        parts = [self.order[ends[i] - self.counts[i] : ends[i]] for i in run.tolist()]
        return np.concatenate(parts)


def choose_adopted(
    staged: dict[int, int], resident: dict[int, int], n_free: int
) -> tuple[set[int], int]:
    """Which staged experts the bank takes in, and how many resident ones leave for them.

    Both map an expert to how often the call uses it. The most used fill the free slots; after
    that the most used one that is left takes the place of the least used resident one, as long
    as it is used more often.
    """
    candidates = sorted(staged, key=lambda expert: (-staged[expert], expert))
    leaving = 0
    for expert, uses in zip(candidates[n_free:], sorted(resident.values()), strict=False):
        if staged[expert] <= uses:
            break
        leaving += 1
    return set(candidates[: n_free + leaving]), leaving


class ExpertPrefill:
    """One layer's calls that need more experts than a token does.

    `x` [..., d_in] and `indices` [..., k] on the host -> [..., k, d_out], evaluated, in x's
    dtype. `forwards` run over the slots of the staging groups, `bank_forward` over the bank's.
    """

    def __init__(
        self,
        path: Path,
        unit: Unit,
        reader: Reader,
        meter: Meter,
        bank: LayerBank,
        staging: Staging,
        forwards: Sequence[ExpertForward],
    ) -> None:
        self._path = path
        self._unit = unit
        self._reader = reader
        self._counters, self._clock = meter.counters, meter.clock
        self._bank = bank
        self._staging = staging
        self._forwards = forwards

    def __call__(
        self, x: mx.array, indices: npt.NDArray[Any], bank_forward: ExpertForward
    ) -> mx.array:
        """Raises ReadError when a record cannot be read whole, and FlashMoEError once the bank
        is closed; whatever is raised, bank and staging can be used again."""
        rows = RoutedRows.of(indices)
        # A record that a warm start has yet to read may be needed here: it would be read twice.
        self._bank.pause_warm_start(rows.experts.tolist())
        table = self._bank.slot_table()
        here = table[rows.experts] != ABSENT
        missing = np.flatnonzero(~here)
        self._count(len(rows.experts), len(missing))
        result = _Result(x.reshape(-1, x.shape[-1]), indices.shape[-1], indices.size)
        n_tokens = indices.size // indices.shape[-1]
        runs = rows.split(missing, self._staging.group_records, n_tokens)
        try:
            ticket = self._submit(rows.experts[runs[0]], 0) if runs else None
            for run in rows.split(np.flatnonzero(here), len(here), n_tokens):
                slots = table[rows.experts[run]]
                self._compute(result, rows, run, slots, bank_forward)
            adopted = self._make_room(rows, missing)
            for number, run in enumerate(runs):
                following = runs[number + 1 : number + 2]
                upcoming = [self._submit(rows.experts[r], number + 1) for r in following]
                assert ticket is not None
                self._wait(ticket, len(run), number)
                slots = np.arange(len(run), dtype=np.int32)
                forward = self._forwards[number % N_GROUPS]
                self._compute(result, rows, run, slots, forward)
                for slot, expert in enumerate(rows.experts[run].tolist()):
                    if expert in adopted:
                        self._bank.adopt(expert, self._staging.groups[number % N_GROUPS], slot)
                ticket = upcoming[0] if upcoming else None
        except BaseException:
            # Nobody may go on writing to a group that the next call reads into.
            self._reader.drain()
            raise
        # The experts of most rows count as used last.
        self._bank.use(rows.experts[np.argsort(rows.counts, kind="stable")].tolist())
        self._bank.resume_warm_start()
        y = result.array()
        return y.reshape(*indices.shape, y.shape[-1])

    def _count(self, n_experts: int, n_missing: int) -> None:
        self._counters.hits += n_experts - n_missing
        self._counters.misses += n_missing
        self._counters.bytes_demanded += n_experts * self._unit.record.stride
        self._counters.bytes_absent += n_missing * self._unit.record.stride

    def _submit(self, experts: Ints, number: int) -> Ticket:
        """Begin to read a run of records, one after the other on disk, into a staging group."""
        group = self._staging.groups[number % N_GROUPS]
        return self._reader.submit(
            [
                ReadRequest(
                    self._path, self._unit.record_offset(expert), group.destination(slot, slot)
                )
                for slot, expert in enumerate(experts.tolist())
            ]
        )

    def _wait(self, ticket: Ticket, n_records: int, number: int) -> None:
        with self._clock.during("reading"):
            ticket.wait()
            for slot in range(n_records):
                self._staging.groups[number % N_GROUPS].widen(slot, slot)
        self._counters.bytes_read += n_records * self._unit.record.stride

    def _compute(
        self,
        result: _Result,
        rows: RoutedRows,
        run: Ints,
        slots: npt.NDArray[np.int32],
        forward: ExpertForward,
    ) -> None:
        with self._clock.during("experts"):
            result.put(rows.pairs(run), np.repeat(slots, rows.counts[run])[:, None], forward)

    def _make_room(self, rows: RoutedRows, missing: Ints) -> set[int]:
        """Free the slots of the resident experts that leave; returns the experts to adopt."""
        if not len(missing):
            return set()
        uses = dict(zip(rows.experts.tolist(), rows.counts.tolist(), strict=True))
        staged = {expert: uses[expert] for expert in rows.experts[missing].tolist()}
        resident = {expert: uses.get(expert, 0) for expert in self._bank.held()}
        adopted, leaving = choose_adopted(staged, resident, self._bank.n_free)
        self._bank.make_room(resident, leaving)
        return adopted


class _Result:
    """Routed rows [n_pairs, d_out], filled run by run.

    Written in place: parts that wait for being put together would double a long prompt's memory.
    """

    def __init__(self, x: mx.array, top_k: int, n_pairs: int) -> None:
        self._x = x
        self._top_k = top_k
        self._n_pairs = n_pairs
        self._array: mx.array | None = None
        self._rows: npt.NDArray[Any] | None = None

    def put(self, pairs: Ints, slots: npt.NDArray[np.int32], forward: ExpertForward) -> None:
        """Run the pairs' tokens through their slots [n, 1], and evaluate that."""
        y = forward(self._x[mx.array(pairs // self._top_k)], slots)
        mx.eval(y)
        if self._rows is None:
            self._array = mx.zeros((self._n_pairs, y.shape[-1]), y.dtype)
            mx.eval(self._array)
            self._rows = self._view(shared_bytes(self._array), y)
        self._rows[pairs] = self._view(array_bytes(y), y)

    def array(self) -> mx.array:
        assert self._array is not None
        self._rows = None
        return self._array

    def _view(self, memory: memoryview, y: mx.array) -> npt.NDArray[Any]:
        return np.frombuffer(memory, _CARRIERS[y.dtype.size]).reshape(-1, y.shape[-1])
