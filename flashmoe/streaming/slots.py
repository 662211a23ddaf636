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
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flashmoe.dtypes import FLOATING, MLX_DTYPES, shared_bytes
from flashmoe.io.reader import Scatter, address_of
from flashmoe.store.layout import (
    COMPONENT_ALIGN_BYTES,
    DTYPE_BYTES,
    Component,
    RecordLayout,
    align,
)
from flashmoe.streaming.pages import zero_in_large_pages

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

    `weights` maps "projection.tensor" to an array [n_slots, *shape] in the held dtype. The
    arrays are allocated and touched once and never replaced: what is read into a slot is what
    a kernel sees next.
    """

    def __init__(self, record: RecordLayout, n_slots: int, n_rows: int, widen: bool) -> None:
        self.n_slots = n_slots
        self.n_rows = n_rows
        self.weights: dict[str, mx.array] = {}
        self._places: list[_Place] = []
        for component in record.components:
            held = held_dtype(component, widen)
            size = math.prod(component.shape) * DTYPE_BYTES[held]
            raw = _allocate(n_slots * size)
            array = raw.view(MLX_DTYPES[held]).reshape(n_slots, *component.shape)
            mx.eval(array)
            self.weights[component.name] = array
            widened = held != component.dtype
            assert not widened or component.dtype in FLOATING
            rows_bytes = n_rows * align(component.nbytes, COMPONENT_ALIGN_BYTES)
            staging = memoryview(mmap.mmap(-1, rows_bytes)) if widened else None
            self._places.append(_Place(component, shared_bytes(raw), size, staging))
        self._gaps = _gaps(record)
        self._waste = memoryview(bytearray(max(self._gaps, default=0)))
        self.staged = any(place.staging is not None for place in self._places)
        self._destinations: dict[int, Scatter] = {}

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

    def settle(self, slot: int, row: int) -> None:
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


def _allocate(size_bytes: int) -> mx.array:
    """Zeros [size_bytes] uint8 that begin on COMPONENT_ALIGN_BYTES, touched."""
    whole = mx.zeros(size_bytes + COMPONENT_ALIGN_BYTES, mx.uint8)
    mx.eval(whole)
    memory = shared_bytes(whole)
    zero_in_large_pages(memory)
    first = -address_of(memory) % COMPONENT_ALIGN_BYTES
    # A slice of a flat array is a view of it.
    array = whole[first : first + size_bytes]
    mx.eval(array)
    return array


def _gaps(record: RecordLayout) -> list[int]:
    """Padding bytes after each component that a read has to skip; none after the last."""
    starts = [component.offset for component in record.components][1:]
    ends = [component.end for component in record.components]
    return [start - end for end, start in zip(ends, starts, strict=False)] + [0]
