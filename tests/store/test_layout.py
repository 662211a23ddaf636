import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.store.layout import (
    DTYPE_BYTES,
    Component,
    LayerLayout,
    RecordLayout,
    TensorSpec,
    align,
    lay_out_record,
    safetensors_header,
)
from tests.support.stores import layer_layout

# Qwen3.5-397B: hidden 4096, expert width 1024, 4 bits in groups of 64, 512 experts, 60 layers.
QWEN_397B = [
    TensorSpec(f"{projection}.{part}", dtype, (rows, columns // per))
    for projection, rows, columns in (
        ("gate_proj", 1024, 4096),
        ("up_proj", 1024, 4096),
        ("down_proj", 4096, 1024),
    )
    for part, dtype, per in (("weight", "U32", 8), ("scales", "BF16", 64), ("biases", "BF16", 64))
]

tensors = st.lists(
    st.tuples(
        st.sampled_from(sorted(DTYPE_BYTES)),
        st.lists(st.integers(0, 40), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=9,
).map(lambda drawn: [TensorSpec(f"t{i}.weight", *spec) for i, spec in enumerate(drawn)])


def test_qwen_397b_record():
    record = lay_out_record(QWEN_397B)
    assert record.stride == record.payload_bytes == 7_077_888 == 432 * 16_384
    assert [component.offset for component in record.components] == [
        0,
        2_097_152,
        2_228_224,
        2_359_296,
        4_456_448,
        4_587_520,
        4_718_592,
        6_815_744,
        6_946_816,
    ]
    layer = LayerLayout("mlp", "SwitchGLU", "experts/layer-000.safetensors", 512, 10, record)
    assert layer.data_start == 16_384
    assert layer.record_offset(0) == 16_384
    assert layer.record_offset(511) == 16_384 + 511 * 7_077_888
    assert layer.file_bytes == 3_623_895_040


def test_padding_between_components():
    record = lay_out_record(
        [
            TensorSpec("gate_proj.weight", "U8", (4096,)),
            TensorSpec("gate_proj.scales", "BF16", (2049,)),
            TensorSpec("down_proj.bias", "F32", (1,)),
        ]
    )
    assert [c.offset for c in record.components] == [0, 4096, 12_288]
    assert [c.end for c in record.components] == [4096, 8194, 12_292]
    assert [c.projection for c in record.components] == ["gate_proj", "gate_proj", "down_proj"]
    assert (record.payload_bytes, record.stride) == (8198, 16_384)


@pytest.mark.parametrize(
    ("size_bytes", "alignment", "aligned"),
    [
        (0, 4096, 0),
        (1, 4096, 4096),
        (4096, 4096, 4096),
        (4097, 4096, 8192),
        (2**62 + 1, 2, 2**62 + 2),
    ],
)
def test_align(size_bytes, alignment, aligned):
    assert align(size_bytes, alignment) == aligned


@pytest.mark.parametrize(("dtype", "nbytes"), sorted(DTYPE_BYTES.items()))
def test_nbytes(dtype, nbytes):
    assert TensorSpec("x", dtype, (3, 5)).nbytes == 15 * nbytes
    assert TensorSpec("scalar", dtype, ()).nbytes == nbytes
    assert TensorSpec("empty", dtype, (3, 0)).nbytes == 0


@given(tensors)
def test_records_keep_order_alignment_and_distance(specs):
    record = lay_out_record(specs)
    assert [(c.name, c.dtype, c.shape) for c in record.components] == [
        (t.name, t.dtype, t.shape) for t in specs
    ]
    end = 0
    for component in record.components:
        assert component.offset % 4096 == 0
        assert 0 <= component.offset - end < 4096
        assert component.end - component.offset == component.nbytes
        end = component.end
    assert record.stride % 16_384 == 0
    assert 0 <= record.stride - end < 16_384
    assert record.payload_bytes == sum(tensor.nbytes for tensor in specs)


@given(tensors, st.integers(1, 600))
def test_records_fill_the_file(specs, n_experts):
    record = lay_out_record(specs)
    layer = LayerLayout("mlp", "SwitchMLP", "layer", n_experts, 1, record)
    offsets = [layer.record_offset(expert) for expert in range(n_experts)]
    assert offsets[0] == layer.data_start == 16_384
    assert all(offset % 16_384 == 0 for offset in offsets)
    assert {b - a for a, b in itertools.pairwise(offsets)} <= {record.stride}
    assert offsets[-1] + record.stride == layer.file_bytes


@given(tensors)
def test_headers_are_padded_to_pages(specs):
    header = safetensors_header(specs)
    assert len(header) == 16_384
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    text = header[8:].rstrip(b" ")
    entries = json.loads(text)
    assert text == json.dumps(entries, separators=(",", ":")).encode()
    offset = 0
    for tensor in specs:
        entry = entries.pop(tensor.name)
        assert entry["data_offsets"] == [offset, offset + tensor.nbytes]
        assert entry["shape"] == list(tensor.shape)
        assert entry["dtype"] == tensor.dtype
        offset += tensor.nbytes
    assert entries == {}


def test_long_headers_take_more_pages():
    specs = [TensorSpec(f"model.layers.{i}.norm.weight", "F32", (64,)) for i in range(300)]
    header = safetensors_header(specs)
    assert len(header) == 32_768
    assert len(json.loads(header[8:])) == 300


def test_a_header_that_just_fits_takes_one_page():
    room = 16_384 - 8 - len('{"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}')
    assert len(safetensors_header([TensorSpec("x" * room, "U8", (1,))])) == 16_384
    assert len(safetensors_header([TensorSpec("x" * (room + 1), "U8", (1,))])) == 32_768


def test_layer_header():
    assert layer_layout(n_experts=3).header.rstrip(b" ")[8:] == (
        b'{"records":{"dtype":"U8","shape":[3,16384],"data_offsets":[0,49152]}}'
    )


def test_record_layout_is_a_value():
    component = Component("gate_proj.weight", "U8", (2,), 0)
    assert RecordLayout((component,), 16_384) == lay_out_record(
        [TensorSpec("gate_proj.weight", "U8", (2,))]
    )
