"""A repack needs memory for what it reads ahead, however large the model is."""

import json
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from flashmoe.checkpoint.architecture import build_model
from flashmoe.repacking.source_stream import AHEAD_BYTES
from tests.support.families import FAMILIES

# 8 experts of 3 * 512 * 384 float32 numbers in each layer: 19 MB.
LAYER_BYTES = 8 * 3 * 512 * 384 * 4
ALLOWANCE_BYTES = 60_000_000

MEASURE = """
import sys
from flashmoe.base.machine import peak_resident_set_bytes, resident_set_bytes
from flashmoe.repacking.repack import repack

before = resident_set_bytes()
repack(sys.argv[1], sys.argv[2], bits=int(sys.argv[3]))
print(peak_resident_set_bytes() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Float32 checkpoints of 6 and 12 layers, by number of layers."""
    folders = {}
    for n_layers in (6, 12):
        folder = tmp_path_factory.mktemp("large")
        config = {
            **FAMILIES["qwen3_moe"],
            "hidden_size": 512,
            "moe_intermediate_size": 384,
            "num_hidden_layers": n_layers,
            "mlp_only_layers": [],
        }
        model, _ = build_model(config)
        arrays = {
            name: mx.broadcast_to(mx.random.normal(array.shape[-2:]), array.shape)
            for name, array in tree_flatten(model.parameters())
        }
        mx.save_safetensors(str(folder / "model.safetensors"), arrays)
        (folder / "config.json").write_text(json.dumps(config))
        folders[n_layers] = folder
    yield folders
    for folder in folders.values():
        shutil.rmtree(folder)


@pytest.mark.parametrize("bits", [4, 32])
def test_memory_does_not_grow_with_the_model(large, tmp_path, bits):
    peaks = {}
    for n_layers, folder in large.items():
        assert (folder / "model.safetensors").stat().st_size > n_layers * LAYER_BYTES
        store = tmp_path / str(n_layers)
        ran = subprocess.run(
            [sys.executable, "-c", MEASURE, str(folder), str(store), str(bits)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[n_layers] = int(ran.stdout)
        shutil.rmtree(store)
    assert max(peaks.values()) < AHEAD_BYTES + ALLOWANCE_BYTES
    assert abs(peaks[12] - peaks[6]) < LAYER_BYTES
