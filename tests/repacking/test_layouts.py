"""However a checkpoint lays its experts out, each expert's numbers reach its own record."""

import numpy as np
import pytest
from safetensors import safe_open

from flashmoe import repack
from tests.support.checkpoints import GOLDEN, checkpoint_tensors, save_shards, store_tensors


def source_array(folder, name):
    with safe_open(folder / "model.safetensors", "np") as file:
        return file.get_tensor(name)


def record_array(store, layer, component):
    """A float32 component of all experts, from the records."""
    layout = store.manifest.layers[layer].layout
    dtype, shape, content = store_tensors(store)[f"{layout.path}.{component}"]
    assert dtype == "F32"
    return np.frombuffer(content, np.float32).reshape(shape)


def assert_records(store, layer, part="weight", **projections):
    """The weights (or the biases) of all experts of a layer are these."""
    for name, array in projections.items():
        records = record_array(store, layer, f"{name}_proj.{part}")
        np.testing.assert_array_equal(records, array)


@pytest.mark.parametrize(
    ("family", "names", "first_moe_layer"),
    [
        ("qwen3_5_moe", "model.layers.{}.mlp.experts.{}.{}_proj.weight", 0),
        ("deepseek_v3", "model.layers.{}.mlp.experts.{}.{}_proj.weight", 1),
        ("mixtral", "model.layers.{}.block_sparse_moe.experts.{}.{}.weight", 0),
    ],
)
def test_experts_one_by_one(dest, family, names, first_moe_layer):
    folder = GOLDEN / family
    store = repack(folder, dest, bits=32)
    mixtral = {"gate": "w1", "up": "w3", "down": "w2"} if family == "mixtral" else {}
    for position, layer in enumerate(store.manifest.layers):
        for part in ("gate", "up", "down"):
            records = record_array(store, position, f"{part}_proj.weight")
            for expert in range(layer.layout.n_experts):
                name = names.format(first_moe_layer + position, expert, mixtral.get(part, part))
                np.testing.assert_array_equal(records[expert], source_array(folder, name))


def test_fused_and_interleaved_experts(dest):
    folder = GOLDEN / "gpt_oss"  # [experts, in, out], gate and up in turn
    store = repack(folder, dest, bits=32)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate_up = source_array(folder, f"{prefix}.gate_up_proj").swapaxes(1, 2)
        gate_up_bias = source_array(folder, f"{prefix}.gate_up_proj_bias")
        down = source_array(folder, f"{prefix}.down_proj").swapaxes(1, 2)
        down_bias = source_array(folder, f"{prefix}.down_proj_bias")
        gate, up = gate_up[:, 0::2], gate_up[:, 1::2]
        assert_records(store, layer, gate=gate, up=up, down=down)
        gate, up = gate_up_bias[:, 0::2], gate_up_bias[:, 1::2]
        assert_records(store, layer, "bias", gate=gate, up=up, down=down_bias)


def test_fused_experts_in_halves(dest):
    folder = GOLDEN / "granitemoe"  # [experts, out, in], gate above up
    store = repack(folder, dest, bits=32)
    for layer in range(2):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        gate, up = np.split(source_array(folder, f"{prefix}.input_linear.weight"), 2, axis=1)
        down = source_array(folder, f"{prefix}.output_linear.weight")
        assert_records(store, layer, gate=gate, up=up, down=down)


def test_the_released_layout_of_qwen3_5(dest):
    folder = GOLDEN / "qwen3_5_moe_vl"
    store = repack(folder, dest, bits=32)
    assert not any("visual" in name for name in store_tensors(store))
    for layer in range(len(store.manifest.layers)):
        prefix = f"model.language_model.layers.{layer}.mlp.experts"
        gate, up = np.split(source_array(folder, f"{prefix}.gate_up_proj"), 2, axis=1)
        down = source_array(folder, f"{prefix}.down_proj")
        assert_records(store, layer, gate=gate, up=up, down=down)


def test_a_checkpoint_in_many_shards(float_qwen, source, dest):
    save_shards(float_qwen, source)
    store = repack(source, dest, bits=32)
    assert store_tensors(store) == checkpoint_tensors(float_qwen)
    assert {"model-0.safetensors", "model-1.safetensors", "model-2.safetensors"} <= set(
        store.manifest.source.files
    )
