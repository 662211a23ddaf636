"""Byte arithmetic of a store: dtypes, records and safetensors headers.

A record is every component of one expert in a fixed order. Components start on 4 KiB inside
the record and records on 16 KiB (the page of Apple Silicon), so that any of them can be read
with direct I/O. A layer file is a valid safetensors file with one tensor `records`, U8
`[n_experts, stride_bytes]`, whose header is padded with spaces until the data starts at 16 KiB.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

PAGE_BYTES = 16384
COMPONENT_ALIGN_BYTES = 4096
RECORDS_TENSOR = "records"

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


def align(size_bytes: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `size_bytes`."""
    return -(-size_bytes // alignment) * alignment


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor; `dtype` is a safetensors name such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Component(TensorSpec):
    """One tensor of one expert, `name` being "projection.tensor"; `offset` counts from the
    start of the record."""

    offset: int

    @property
    def projection(self) -> str:
        return self.name.split(".")[0]

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class Quantization:
    """How a weight is packed; `mode` is MLX's: affine, mxfp4, nvfp4 or mxfp8."""

    bits: int
    group_size: int
    mode: str = "affine"


@dataclass(frozen=True)
class RecordLayout:
    """Where each component lies in a record of `stride` bytes."""

    components: tuple[Component, ...]
    stride: int

    @property
    def payload_bytes(self) -> int:
        """Bytes of a record that are not padding."""
        return sum(component.nbytes for component in self.components)


def lay_out_record(tensors: Sequence[TensorSpec]) -> RecordLayout:
    """Place one expert's tensors (shapes without the expert axis) in the order given."""
    components = []
    offset = 0
    for tensor in tensors:
        components.append(Component(tensor.name, tensor.dtype, tensor.shape, offset))
        offset = align(offset + tensor.nbytes, COMPONENT_ALIGN_BYTES)
    return RecordLayout(tuple(components), align(offset, PAGE_BYTES))


# Who says which records a step needs: a router while the layer runs, or the order of the layers.
AskedBy = Literal["router", "order"]


@dataclass(frozen=True)
class Unit:
    """What one layer streams: `n_records` records of one layout, one behind the other in `file`
    from `data_start` on. A step of one token needs `step_records` of them, which are `asked_by`
    somebody."""

    name: str
    file: str
    record: RecordLayout
    n_records: int
    step_records: int
    data_start: int
    asked_by: AskedBy = "router"

    def record_offset(self, number: int) -> int:
        """Offset of a record from the start of the file."""
        return self.data_start + number * self.record.stride

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return self.n_records * self.record.stride


@dataclass(frozen=True)
class LayerLayout:
    """One MoE layer's file: `n_experts` records, one per expert, in expert order.

    `path` is the dotted path of the module in the mlx-lm model, `kind` its class name
    (SwitchGLU or SwitchMLP), `top_k` the experts routed per token, `projections` the packing
    of each projection that is quantized.
    """

    path: str
    kind: str
    file: str
    n_experts: int
    top_k: int
    record: RecordLayout
    projections: dict[str, Quantization] = field(default_factory=dict)

    @property
    def header(self) -> bytes:
        tensor = TensorSpec(RECORDS_TENSOR, "U8", (self.n_experts, self.record.stride))
        return safetensors_header([tensor])

    @cached_property
    def data_start(self) -> int:
        return len(self.header)

    @property
    def file_bytes(self) -> int:
        return self.data_start + self.n_experts * self.record.stride

    @cached_property
    def unit(self) -> Unit:
        """This layer as the online side sees it: an expert is a record."""
        return Unit(self.path, self.file, self.record, self.n_experts, self.top_k, self.data_start)

    def record_offset(self, expert: int) -> int:
        """Offset of an expert's record from the start of the file."""
        return self.unit.record_offset(expert)


def safetensors_header(tensors: Sequence[TensorSpec]) -> bytes:
    """The header of a file that holds `tensors` back to back, padded to a 16 KiB multiple."""
    entries: dict[str, object] = {}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = align(8 + len(text), PAGE_BYTES) - 8
    return length.to_bytes(8, "little") + text.ljust(length)
