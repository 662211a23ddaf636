"""Slot memory: one row-contiguous MLX array per component, written to by preadv.

A component whose dtype the kernels compute in lands in its slot directly. A floating component
of another dtype (bfloat16 scales under float32 activations) lands in a staging buffer and is
widened into its slot, which costs memory but no exactness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flashmoe.dtypes import FLOATING, MLX_DTYPES, shared_bytes
from flashmoe.store.layout import DTYPE_BYTES, Component, RecordLayout

_WIDENED = {"BF16": "F32", "F16": "F32"}


def held_dtype(component: Component, widen: bool) -> str:
    """The dtype a component has in memory; widening turns 16-bit floats into float32."""
    return _WIDENED.get(component.dtype, component.dtype) if widen else component.dtype


def slot_bytes(record: RecordLayout, widen: bool) -> int:
    """Memory of one slot."""
    return sum(math.prod(c.shape) * DTYPE_BYTES[held_dtype(c, widen)] for c in record.components)


def staging_bytes(record: RecordLayout, widen: bool) -> int:
    """Staging memory that one read in flight needs."""
    return sum(c.nbytes for c in record.components if held_dtype(c, widen) != c.dtype)


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
        assert self.staging is not None
        return self.staging[index * self.component.nbytes : (index + 1) * self.component.nbytes]


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
            raw = _allocate(n_slots, size)
            array = raw.view(MLX_DTYPES[held]).reshape(n_slots, *component.shape)
            mx.eval(array)
            self.weights[component.name] = array
            widened = held != component.dtype
            assert not widened or component.dtype in FLOATING
            staging = memoryview(bytearray(n_rows * component.nbytes)) if widened else None
            self._places.append(_Place(component, shared_bytes(raw), size, staging))
        self._gaps = _gaps(record)
        self._waste = memoryview(bytearray(max(self._gaps, default=0)))

    def release(self) -> None:
        """Forget the arrays; they are freed once nothing that was computed needs them."""
        self.weights.clear()
        self._places.clear()

    def buffers(self, slot: int, row: int) -> list[memoryview]:
        """Where the bytes of a record go, in file order, padding included up to the last
        component; `row` (below n_rows) is the staging row of this read."""
        buffers = []
        for place, gap in zip(self._places, self._gaps, strict=True):
            buffers.append(place.slot(slot) if place.staging is None else place.row(row))
            if gap:
                buffers.append(self._waste[:gap])
        return buffers

    def settle(self, slots: Sequence[int]) -> None:
        """Widen what reads into rows 0, 1, ... brought for these slots."""
        for place in self._places:
            if place.staging is None:
                continue
            for row, slot in enumerate(slots):
                stored = place.row(row)
                target = np.frombuffer(place.slot(slot), np.float32)
                if place.component.dtype == "BF16":
                    bits = np.frombuffer(stored, np.uint16)
                    np.left_shift(bits, 16, out=target.view(np.uint32), dtype=np.uint32)
                else:
                    target[:] = np.frombuffer(stored, np.float16)


def _allocate(n_slots: int, size_bytes: int) -> mx.array:
    array = mx.zeros((n_slots, size_bytes), mx.uint8)
    mx.eval(array)
    return array


def _gaps(record: RecordLayout) -> list[int]:
    """Padding bytes after each component that a read has to skip; none after the last."""
    starts = [component.offset for component in record.components][1:]
    ends = [component.end for component in record.components]
    return [start - end for end, start in zip(ends, starts, strict=False)] + [0]
