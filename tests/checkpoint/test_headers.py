import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from flashmoe.base.errors import FlashMoEError, SourceError
from flashmoe.checkpoint.headers import TensorInfo, read_header
from flashmoe.checkpoint.source import Checkpoint, check_files
from tests.support.stores import frugal

ARRAYS = {
    "embed.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "norm.weight": np.arange(5, dtype=np.float16),
    "ids": np.arange(6, dtype=np.uint8).reshape(1, 2, 3),
    "scalar": np.array(7, dtype=np.int64),
    "none": np.zeros((0, 4), dtype=np.float32),
}
DTYPES = {"float32": "F32", "float16": "F16", "uint8": "U8", "int64": "I64"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def put(path, header, data=b""):
    """A safetensors file with this header: bytes as they are, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(2,), data_offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


def refuse(path, *fragments):
    with frugal(), pytest.raises(SourceError) as caught:
        read_header(path)
    assert isinstance(caught.value, FlashMoEError)
    message = str(caught.value)
    assert len(message) < 1000
    for fragment in (str(path), *fragments):
        assert fragment in message


class TestGood:
    @pytest.mark.parametrize("metadata", [None, {"format": "mlx", "note": "x" * 100}])
    def test_every_tensor(self, path, metadata):
        save_file(ARRAYS, path, metadata)
        tensors = read_header(path)
        assert set(tensors) == set(ARRAYS)
        content = path.read_bytes()
        for name, array in ARRAYS.items():
            tensor = tensors[name]
            assert (tensor.dtype, tensor.shape) == (DTYPES[array.dtype.name], array.shape)
            assert content[tensor.begin : tensor.end] == array.tobytes()
            assert tensor.size == array.size

    def test_offsets_count_from_the_start_of_the_file(self, path):
        put(path, {"a": entry()}, bytes(8))
        start = path.stat().st_size - 8
        assert read_header(path) == {"a": TensorInfo("F32", (2,), start, start + 8)}

    def test_no_tensors(self, path):
        put(path, {})
        assert read_header(path) == {}
        put(path, {"__metadata__": {"format": "pt"}})
        assert read_header(path) == {}

    @given(
        st.dictionaries(
            st.text("abc._é", min_size=1, max_size=6),
            st.tuples(
                st.sampled_from([np.float32, np.float16, np.uint8, np.int64]),
                st.lists(st.integers(0, 5), max_size=3),
            ),
            max_size=6,
        )
    )
    def test_any_file_of_safetensors(self, tmp_path_factory, drawn):
        path = tmp_path_factory.getbasetemp() / "any.safetensors"
        arrays = {name: np.ones(shape, dtype) for name, (dtype, shape) in drawn.items()}
        save_file(arrays, path)
        content = path.read_bytes()
        tensors = read_header(path)
        assert set(tensors) == set(arrays)
        for name, array in arrays.items():
            assert tensors[name].shape == array.shape
            assert content[tensors[name].begin : tensors[name].end] == array.tobytes()
        assert max([t.end for t in tensors.values()], default=len(content)) == len(content)


class TestTruncated:
    def test_at_every_byte(self, path):
        save_file({"a": np.arange(4, dtype=np.float32)}, path)
        size = path.stat().st_size
        for left in range(size - 1, -1, -1):
            os.truncate(path, left)
            with pytest.raises(SourceError, match=r"model\.safetensors .*download it again"):
                read_header(path)

    def test_the_message_counts(self, path):
        save_file({"a": np.arange(4, dtype=np.float32)}, path)
        size = path.stat().st_size
        os.truncate(path, size - 1)
        refuse(path, f"its tensors end at {size} but the file has {size - 1} bytes")


class TestUnreadable:
    def test_missing(self, path):
        refuse(path, "cannot be read: No such file or directory")

    def test_folder(self, path):
        path.mkdir()
        refuse(path, "cannot be read")

    def test_symlink_loop(self, path):
        path.symlink_to(path.name)
        refuse(path, "cannot be read")


class TestLength:
    @pytest.mark.parametrize("length", [0, 1, 11, 2**20, 100 * 2**20 + 1, 2**40, 2**63, 2**64 - 1])
    def test_a_length_that_does_not_fit(self, path, length):
        path.write_bytes(length.to_bytes(8, "little") + b'{"a":null}')
        refuse(path, "is not a whole safetensors file", f"header of {length} bytes")

    def test_a_header_beyond_100_mib(self, path):
        length = 100 * 2**20 + 1
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        os.truncate(path, 2**30)
        refuse(path, "is not a whole safetensors file")


class TestJson:
    @pytest.mark.parametrize(
        "header",
        [
            b"not JSON",
            b"{,}",
            b'{"a":',
            b"\xff\xfe\xfd",
            b'{"a": \xc3}',
            b"\0" * 100,
            b"[" * 50_000,
            b'{"a":' * 50_000,
            b'{"a":' + b"9" * 5000 + b"}",
        ],
        ids=lambda header: ascii(header[:8]),
    )
    def test_not_json(self, path, header):
        put(path, header)
        refuse(path, "has a header that is not JSON")

    @pytest.mark.parametrize("header", [[], None, 5, "x", [{}], True])
    def test_not_an_object(self, path, header):
        put(path, header)
        if header is None or header is True:
            refuse(path)
        else:
            refuse(path, "safetensors")

    @pytest.mark.parametrize("value", [None, 5, "F32", [], {}, True])
    def test_an_entry_that_is_no_tensor(self, path, value):
        put(path, {"a": value})
        refuse(path, "malformed safetensors header")

    @pytest.mark.parametrize("name", ["dtype", "shape", "data_offsets"])
    @pytest.mark.parametrize("value", [None, 5, 1.5, [], {}, "xy", True, [None], ["a", "b"], [[]]])
    def test_a_field_of_a_wrong_type(self, path, name, value):
        if name == "shape" and value == []:
            value = [-1]
        put(path, {"a": entry() | {name: value}}, bytes(8))
        refuse(path)

    @pytest.mark.parametrize("name", ["dtype", "shape", "data_offsets"])
    def test_a_missing_field(self, path, name):
        fields = entry()
        del fields[name]
        put(path, {"a": fields}, bytes(8))
        refuse(path, "malformed safetensors header")

    @pytest.mark.parametrize("text", [b"Infinity", b"-Infinity", b"NaN", b"1e999"])
    @pytest.mark.parametrize("name", ["shape", "data_offsets"])
    def test_numbers_without_end(self, path, name, text):
        first = json.dumps({"a": entry() | {name: [424242, 424242]}}).encode()
        put(path, first.replace(b"424242", text), bytes(8))
        refuse(path)

    def test_a_tensor_stated_twice(self, path):
        text = json.dumps(entry()).encode()
        put(path, b'{"a":' + text + b',"a":' + text + b"}", bytes(8))
        refuse(path)


class TestOffsets:
    @pytest.mark.parametrize(
        "offsets",
        [
            (8, 0),
            (0, 4),
            (0, 16),
            (-8, 0),
            (-4, 4),
            (0, -8),
            (0, 2**70),
            (2**70, 2**70 + 8),
            (0.0, 8.0),
            (0, 8.5),
            (0, "8"),
            (0,),
            (0, 4, 8),
            (False, 8),
        ],
    )
    def test_wrong_offsets(self, path, offsets):
        put(path, {"a": entry(data_offsets=offsets)}, bytes(64))
        refuse(path)

    @pytest.mark.parametrize(
        "shape", [(3,), (1,), (2, 2), (-2,), (-1, -2), (2.0,), (1.9,), ("2",), (True, 2), (2**70,)]
    )
    def test_shapes_that_do_not_match_the_bytes(self, path, shape):
        put(path, {"a": entry(shape=shape)}, bytes(64))
        refuse(path)

    @pytest.mark.parametrize("dtype", ["F99", "", "float32", "f32"])
    def test_unknown_dtype(self, path, dtype):
        put(path, {"a": entry(dtype)}, bytes(8))
        refuse(path)

    def test_overlapping_tensors(self, path):
        put(path, {"a": entry(), "b": entry(data_offsets=(4, 12))}, bytes(12))
        refuse(path)

    def test_a_long_shape(self, path):
        put(path, {"a": entry(shape=[2**40] * 20_000)}, bytes(8))
        refuse(path)

    @pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64"])
    def test_dtypes_of_newer_checkpoints(self, path, dtype):
        """Known to safetensors, hence no sign of damage; who loads them decides."""
        nbytes = {"F4": 32, "F6_E2M3": 48, "C64": 512}.get(dtype, 64)
        put(path, {"a": entry(dtype, [64], [0, nbytes])}, bytes(nbytes))
        assert read_header(path)["a"].shape == (64,)


class TestCheckFiles:
    def test_all_files_together(self, tmp_path):
        save_file({"a": ARRAYS["ids"]}, tmp_path / "model-00001-of-00002.safetensors")
        save_file({"b": ARRAYS["ids"]}, tmp_path / "model-00002-of-00002.safetensors")
        save_file({"c": ARRAYS["ids"]}, tmp_path / "other.safetensors")
        assert sorted(check_files(Checkpoint(tmp_path, "x"))) == ["a", "b"]

    def test_a_file_that_the_index_lists_is_missing(self, tmp_path):
        save_file({"a": ARRAYS["ids"]}, tmp_path / "model-00001-of-00002.safetensors")
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-2"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(SourceError, match="lacks model-2, which its index lists"):
            check_files(Checkpoint(tmp_path, "x"))

    @pytest.mark.parametrize(
        "index",
        [
            "",
            "[]",
            "{}",
            "null",
            '{"weight_map": []}',
            '{"weight_map": {"a": 5}}',
            '{"weight_map": {"a": ["x"]}}',
            "[" * 50_000,
        ],
        ids=range(8),
    )
    def test_an_index_that_is_none(self, tmp_path, index):
        save_file({"a": ARRAYS["ids"]}, tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(SourceError, match="is not a safetensors index"):
            check_files(Checkpoint(tmp_path, "x"))

    def test_no_weights(self, tmp_path):
        with pytest.raises(SourceError, match=r"has no model\*\.safetensors"):
            check_files(Checkpoint(tmp_path, "x"))

    def test_one_truncated_file(self, tmp_path):
        save_file({"a": ARRAYS["ids"]}, tmp_path / "model-00001-of-00002.safetensors")
        save_file({"b": ARRAYS["ids"]}, tmp_path / "model-00002-of-00002.safetensors")
        path = tmp_path / "model-00002-of-00002.safetensors"
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(SourceError, match=r"model-00002-of-00002\.safetensors is truncated"):
            check_files(Checkpoint(tmp_path, "x"))
