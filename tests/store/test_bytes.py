"""Every byte of a store of version 1, pinned: a change here is a change of the format."""

import hashlib

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from flashmoe.store.inspect import inspect
from flashmoe.store.layout import Component
from flashmoe.store.parse import load_manifest
from flashmoe.store.reader import open_store
from tests.support.stores import (
    CONFIG,
    EXPERT_TENSORS,
    LAYER_FILE,
    ONE_LAYER_FILES,
    RESIDENT_FILE,
    RESIDENT_TENSORS,
    layer_layout,
    write_store,
)

LAYER_SHA256 = "04395cc93410f5358a75de3303a124749a61b81ae781123829cec331573193ee"
RESIDENT_SHA256 = "cd17ccc8dd6b4183605d892b541b82976581f2b5d2bfc3d2c4b7d649661f701e"
LAYER_HEADER = b'{"records":{"dtype":"U8","shape":[2,16384],"data_offsets":[0,32768]}}'
RESIDENT_HEADER = (
    b'{"embed.weight":{"dtype":"BF16","shape":[6,5],"data_offsets":[0,60]},'
    b'"norm.weight":{"dtype":"F32","shape":[7],"data_offsets":[60,88]}}'
)
# 16,384 - 8, little-endian: the header reaches to the first page boundary.
HEADER_LENGTH = b"\xf8\x3f\0\0\0\0\0\0"

MANIFEST = """\
{
 "format": "flashmoe",
 "version": 1,
 "model_type": "tiny",
 "parameters": 12345,
 "source": {
  "repo": "owner/tiny",
  "revision": "main",
  "files": {
   "model.safetensors": "abababababababababababababababababababababababababababababababab"
  }
 },
 "copied": {
  "config.json": "f68a01c5183a987078f1551e41df128be7273510adba30d0a83cc905e36d13a8"
 },
 "quantization": {
  "embed": {
   "bits": 8,
   "group_size": 32,
   "mode": "affine"
  }
 },
 "resident": [
  {
   "file": "resident-00001-of-00001.safetensors",
   "sha256": "cd17ccc8dd6b4183605d892b541b82976581f2b5d2bfc3d2c4b7d649661f701e",
   "crc32": "b0ec7fee3a8858ed",
   "tensors": [
    {
     "name": "embed.weight",
     "dtype": "BF16",
     "shape": [
      6,
      5
     ]
    },
    {
     "name": "norm.weight",
     "dtype": "F32",
     "shape": [
      7
     ]
    }
   ]
  }
 ],
 "layers": [
  {
   "path": "model.layers.0.mlp.switch_mlp",
   "kind": "SwitchGLU",
   "file": "experts/layer-000.safetensors",
   "n_experts": 2,
   "top_k": 2,
   "stride": 16384,
   "projections": {
    "gate_proj": {
     "bits": 4,
     "group_size": 64,
     "mode": "affine"
    }
   },
   "components": [
    {
     "name": "gate_proj.weight",
     "dtype": "U32",
     "shape": [
      32,
      32
     ],
     "offset": 0
    },
    {
     "name": "gate_proj.scales",
     "dtype": "BF16",
     "shape": [
      32,
      3
     ],
     "offset": 4096
    },
    {
     "name": "down_proj.weight",
     "dtype": "F16",
     "shape": [
      5,
      14
     ],
     "offset": 8192
    }
   ],
   "sha256": "04395cc93410f5358a75de3303a124749a61b81ae781123829cec331573193ee",
   "crc32": "e67e931f18410fb88aeaf65f58e60c15477b6c890fb7c442"
  }
 ]
}
"""

# Expert 0's bytes, then expert 1's.
CONTENTS = {
    "gate_proj.weight": b"\x11" * 4096 + b"\x21" * 4096,
    "gate_proj.scales": b"\x12" * 192 + b"\x22" * 192,
    "down_proj.weight": b"\x13" * 140 + b"\x23" * 140,
}
RESIDENT = [bytes(range(60)), np.arange(7, dtype="<f4").tobytes()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes") / "tiny.flashmoe"
    write_store(folder, [(layer_layout(n_experts=2), CONTENTS)], RESIDENT)
    return folder


def test_files(folder):
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == ONE_LAYER_FILES
    assert (folder / "config.json").read_bytes() == CONFIG


def test_layer_file_bytes(folder):
    content = (folder / LAYER_FILE).read_bytes()
    assert content[:8] == HEADER_LENGTH
    assert content[:16_384] == HEADER_LENGTH + LAYER_HEADER.ljust(16_376)
    for expert, first in ((0, 16_384), (1, 32_768)):
        fill = 16 * (expert + 1)
        record = bytes([fill + 1]) * 4096 + (bytes([fill + 2]) * 192).ljust(4096, b"\0")
        record += (bytes([fill + 3]) * 140).ljust(8192, b"\0")
        assert content[first : first + 16_384] == record
    assert len(content) == 49_152
    assert hashlib.sha256(content).hexdigest() == LAYER_SHA256


def test_resident_file_bytes(folder):
    content = (folder / RESIDENT_FILE).read_bytes()
    assert content[:16_384] == HEADER_LENGTH + RESIDENT_HEADER.ljust(16_376)
    assert content[16_384:] == RESIDENT[0] + RESIDENT[1]
    assert len(content) == 16_472
    assert hashlib.sha256(content).hexdigest() == RESIDENT_SHA256


def test_manifest_text(folder):
    assert (folder / "flashmoe.json").read_text() == MANIFEST


def test_the_same_store_twice_is_the_same_bytes(folder, tmp_path):
    again = tmp_path / "again.flashmoe"
    write_store(again, [(layer_layout(n_experts=2), CONTENTS)], RESIDENT)
    for name in ONE_LAYER_FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_layer_file_opens_as_safetensors(folder):
    with safe_open(folder / LAYER_FILE, framework="numpy") as file:
        assert list(file.keys()) == ["records"]
        assert file.metadata() is None
        records = file.get_slice("records")
        assert (records.get_dtype(), records.get_shape()) == ("U8", [2, 16_384])
    records = load_file(folder / LAYER_FILE)["records"]
    assert (records.dtype, records.shape) == (np.uint8, (2, 16_384))
    for component in layer_layout(n_experts=2).record.components:
        assert records[:, component.offset : component.end].tobytes() == CONTENTS[component.name]


def test_resident_file_opens_as_safetensors(folder):
    with safe_open(folder / RESIDENT_FILE, framework="numpy") as file:
        assert set(file.keys()) == {"embed.weight", "norm.weight"}
        embed = file.get_slice("embed.weight")
        assert (embed.get_dtype(), embed.get_shape()) == ("BF16", [6, 5])
        assert file.get_tensor("norm.weight").tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_manifest_reads_back(folder):
    manifest = load_manifest(folder)
    layer = manifest.layers[0]
    assert layer.layout == layer_layout(n_experts=2)
    assert layer.layout.record.components == (
        Component("gate_proj.weight", "U32", (32, 32), 0),
        Component("gate_proj.scales", "BF16", (32, 3), 4096),
        Component("down_proj.weight", "F16", (5, 14), 8192),
    )
    assert manifest.resident[0].tensors == RESIDENT_TENSORS
    assert (manifest.resident_bytes, manifest.streamed_bytes) == (88, 32_768)
    assert manifest.bytes_per_token == 32_768
    assert len(EXPERT_TENSORS) * 2 * 8 == len(layer.crc32)
    assert open_store(folder).manifest == manifest


def test_inspect(folder):
    summary = inspect(folder)
    assert (summary.path, summary.model_type) == (str(folder), "tiny")
    assert (summary.parameters, summary.records) == (12_345, 2)
    assert (summary.resident_bytes, summary.streamed_bytes) == (88, 32_768)
    assert summary.token_bytes == 32_768
    assert summary.resident_packing == {"8-bit affine/32": 1}
    layer = summary.layers[0]
    assert (layer.experts, layer.top_k, layer.record_bytes) == (2, 2, 16_384)
    assert layer.padding_bytes == 16_384 - 4096 - 192 - 140
    assert layer.packing == {"gate_proj": "4-bit affine/64", "down_proj": "F16"}
