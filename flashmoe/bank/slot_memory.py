"""Slot memory: one row-contiguous MLX array per component, which readers write to.

A component whose dtype the kernels compute in lands in its slot directly. A floating component
of another dtype (bfloat16 scales under float32 activations) lands in a staging buffer and is
widened into its slot, which costs memory but no exactness.

Reads past the page cache go straight to memory that is aligned as the file is: arrays begin on
such a boundary, so every slot of a component whose size is a multiple of it does, too.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from flashmoe.bank.pages import give_back, touch
from flashmoe.bank.reserve import reserve
from flashmoe.base import machine
from flashmoe.base.dtypes import FLOATING, MLX_DTYPES, shared_bytes
from flashmoe.io.reader import Scatter, address_of
from flashmoe.store.layout import (
    COMPONENT_ALIGN_BYTES,
    DTYPE_BYTES,
    Component,
    RecordLayout,
    align,
)

_WORD_BYTES = 8
_WIDENED = {"BF16": "F32", "F16": "F32"}


def held_dtype(component: Component, widen: bool) -> str:
    """The dtype a component has in memory; widening turns 16-bit floats into float32."""
    return _WIDENED.get(component.dtype, component.dtype) if widen else component.dtype


def slot_bytes(record: RecordLayout, widen: bool) -> int:
    """Memory of one slot."""
    return sum(math.prod(c.shape) * DTYPE_BYTES[held_dtype(c, widen)] for c in record.components)


def staging_bytes(record: RecordLayout, widen: bool) -> int:
    """Staging memory that one read in flight needs."""
    staged = (c for c in record.components if held_dtype(c, widen) != c.dtype)
    return sum(align(c.nbytes, COMPONENT_ALIGN_BYTES) for c in staged)


@dataclass(frozen=True)
class _Place:
    """A component's slots as bytes, and its staging rows when it has to be widened."""

    component: Component
    slots: memoryview
    slot_bytes: int
    staging: memoryview | None

    @property
    def n_allocated(self) -> int:
        """How many slots the array has, whether or not there are pages behind all of them."""
        return len(self.slots) // self.slot_bytes

    def slot(self, index: int) -> memoryview:
        return self.slots[index * self.slot_bytes : (index + 1) * self.slot_bytes]

    def row(self, index: int) -> memoryview:
        """A staging row, with the padding behind it."""
        assert self.staging is not None
        size = align(self.component.nbytes, COMPONENT_ALIGN_BYTES)
        return self.staging[index * size : (index + 1) * size]

    def stored(self, index: int) -> memoryview:
        """What was read into a staging row."""
        return self.row(index)[: self.component.nbytes]


class SlotMemory:
    """`n_slots` slots for records of one layout; at most `n_rows` of them are read at once.

    `weights` maps "projection.tensor" to an array [at least n_slots, *shape] in the held dtype.
    What is read into a slot is what a kernel sees next. The arrays are replaced by `resize` only,
    and not by that while they can grow and shrink in place, which they can up to `most_slots`
    where the system has memory that is reserved and not there yet (`reserves`).
    """

    def __init__(
        self,
        record: RecordLayout,
        n_slots: int,
        n_rows: int,
        widen: bool,
        most_slots: int | None = None,
    ) -> None:
        self.n_slots = n_slots
        self.n_rows = n_rows
        self.weights: dict[str, mx.array] = {}
        self._places: list[_Place] = []
        self.reserves = most_slots is not None
        for component in record.components:
            held = held_dtype(component, widen)
            size = math.prod(component.shape) * DTYPE_BYTES[held]
            widened = held != component.dtype
            assert not widened or component.dtype in FLOATING
            rows_bytes = n_rows * align(component.nbytes, COMPONENT_ALIGN_BYTES)
            staging = memoryview(mmap.mmap(-1, rows_bytes)) if widened else None
            if staging is not None:
                touch(staging, 0, rows_bytes)
            array = None
            if most_slots is not None:
                array = _reserve(max(n_slots, most_slots), size)
                self.reserves = self.reserves and array is not None
            if array is None:
                array = _allocate(n_slots, size)
            place = _Place(component, shared_bytes(array), size, staging)
            touch(place.slots, 0, n_slots * size)
            self._places.append(place)
            self._set_weights(component, held, array)
        self._widen = widen
        self._gaps = _gaps(record)
        self._waste = memoryview(bytearray(max(self._gaps, default=0)))
        self.staged = any(place.staging is not None for place in self._places)
        self._destinations: dict[int, Scatter] = {}

    def resizes_in_place(self, n_slots: int) -> bool:
        """Whether `resize` to so many slots would leave the arrays where they are."""
        return self.reserves and all(place.n_allocated >= n_slots for place in self._places)

    def resize(self, n_slots: int) -> None:
        """Have so many slots; what the first of them hold stays.

        In place, pages are given back or touched anew. Otherwise the arrays are replaced, one
        after the other: that takes one component's memory on top, and nobody else may hold them,
        or their memory stays taken. Raises RuntimeError when there is no memory; then there are
        as many slots as the smaller of both numbers.
        """
        kept = min(n_slots, self.n_slots)
        if self.resizes_in_place(n_slots):
            self.n_slots, before = kept, self.n_slots
            self._destinations = {s: d for s, d in self._destinations.items() if s < kept}
            for place in self._places:
                if n_slots < before:
                    # What was touched once can be given back: it was when it was reserved.
                    give_back(place.slots, n_slots * place.slot_bytes)
                touch(place.slots, before * place.slot_bytes, n_slots * place.slot_bytes)
        else:
            self.n_slots = kept
            self.reserves = False
            self._destinations.clear()
            for number, place in enumerate(self._places):
                array = _allocate(n_slots, place.slot_bytes)
                memory = shared_bytes(array)
                touch(memory, 0, len(memory))
                memory[: kept * place.slot_bytes] = place.slots[: kept * place.slot_bytes]
                held = held_dtype(place.component, self._widen)
                self._places[number] = replace(place, slots=memory)
                self._set_weights(place.component, held, array)
                del place
                # What MLX or the allocator keep for themselves would not be given back.
                mx.clear_cache()
                machine.release_freed_memory()
        self.n_slots = n_slots

    def release(self) -> None:
        """Forget the arrays; they are freed once nothing that was computed needs them."""
        self.weights.clear()
        self._places.clear()
        self._destinations.clear()

    def destination(self, slot: int, row: int) -> Scatter:
        """Where the bytes of a record go, in file order, padding included up to the last
        component; `row` (below n_rows) is the staging row of this read."""
        if self.staged:
            return self._scatter(slot, row)
        if slot not in self._destinations:
            self._destinations[slot] = self._scatter(slot, row)
        return self._destinations[slot]

    def copy_slot(self, slot: int, source: SlotMemory, source_slot: int) -> None:
        """Make `slot` hold what a slot of another memory of this layout holds."""
        for place, other in zip(self._places, source._places, strict=True):
            place.slot(slot)[:] = other.slot(source_slot)

    def _set_weights(self, component: Component, held: str, slots: mx.array) -> None:
        """Make bytes [n, slot_bytes] or words of them the array that kernels see."""
        array = slots.view(MLX_DTYPES[held]).reshape(slots.shape[0], *component.shape)
        mx.eval(array)
        self.weights[component.name] = array

    def _scatter(self, slot: int, row: int) -> Scatter:
        buffers = []
        for place, gap in zip(self._places, self._gaps, strict=True):
            if place.staging is not None:
                buffers.append(place.row(row)[: place.component.nbytes + gap])
                continue
            buffers.append(place.slot(slot))
            if gap:
                buffers.append(self._waste[:gap])
        return Scatter(buffers)

    def widen(self, slot: int, row: int) -> None:
        """Widen what a read into this staging row brought for this slot."""
        for place in self._places:
            if place.staging is None:
                continue
            stored = place.stored(row)
            target = np.frombuffer(place.slot(slot), np.float32)
            if place.component.dtype == "BF16":
                bits = np.frombuffer(stored, np.uint16)
                np.left_shift(bits, 16, out=target.view(np.uint32), dtype=np.uint32)
            else:
                target[:] = np.frombuffer(stored, np.float16)


def _allocate(n_slots: int, slot_bytes: int) -> mx.array:
    """Zeros [n_slots, slot_bytes in the widest integers] that begin on COMPONENT_ALIGN_BYTES."""
    whole = mx.zeros(_words(n_slots, slot_bytes), mx.uint64)
    mx.eval(whole)
    # What was written to keeps its small pages until it is given back.
    give_back(shared_bytes(whole), 0)
    return _aligned(whole, n_slots, slot_bytes)


def _reserve(n_slots: int, slot_bytes: int) -> mx.array | None:
    """The same without any memory yet, or None."""
    whole = reserve(_words(n_slots, slot_bytes))
    return None if whole is None else _aligned(whole, n_slots, slot_bytes)


def _words(n_slots: int, slot_bytes: int) -> int:
    return -(-(n_slots * slot_bytes + COMPONENT_ALIGN_BYTES) // _WORD_BYTES)


def _aligned(whole: mx.array, n_slots: int, slot_bytes: int) -> mx.array:
    # Dimensions have 31 bits: counted in wide integers, arrays may have 16 GiB.
    unit = 1 if slot_bytes % _WORD_BYTES else _WORD_BYTES
    first = -address_of(shared_bytes(whole)) % COMPONENT_ALIGN_BYTES // unit
    width = slot_bytes // unit
    flat = whole.view(mx.uint8) if unit == 1 else whole
    # A slice of a flat array is a view of it.
    array = flat[first : first + n_slots * width].reshape(n_slots, width)
    mx.eval(array)
    return array


def _gaps(record: RecordLayout) -> list[int]:
    """Padding bytes after each component that a read has to skip; none after the last."""
    starts = [component.offset for component in record.components][1:]
    ends = [component.end for component in record.components]
    return [start - end for end, start in zip(ends, starts, strict=False)] + [0]
