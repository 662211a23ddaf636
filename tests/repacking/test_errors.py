"""Checkpoints that are not whole, or not mixtures of experts: refused, and nothing is written."""

import os
import shutil

import mlx.core as mx
import pytest

from flashmoe import SourceError, repack
from tests.support.checkpoints import GOLDEN, edit_config, mlx_arrays, save_float, save_shards
from tests.support.families import FAMILIES, save_checkpoint
from tests.support.refusals import refused


def rewrite(checkpoint, folder, change):
    """Writes a checkpoint again, after `change(arrays)` has edited its tensors."""
    folder.mkdir()
    arrays = mlx_arrays(checkpoint)
    change(arrays)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    shutil.copy(checkpoint / "config.json", folder)


def refuse(source, dest, *words, **options):
    """A repack says every word, and writes nothing."""
    with refused(SourceError, *words):
        repack(source, dest, **options)
    assert not dest.exists()


def test_a_shard_that_the_index_lists_is_missing(float_qwen, source, dest):
    save_shards(float_qwen, source)
    (source / "model-1.safetensors").unlink()
    refuse(source, dest, "model-1.safetensors")


@pytest.mark.parametrize("lost_bytes", [1, 100_000, 400_000])
def test_a_truncated_shard(float_qwen, source, dest, lost_bytes):
    save_shards(float_qwen, source)
    path = source / "model-2.safetensors"
    os.truncate(path, max(9, path.stat().st_size - lost_bytes))
    refuse(source, dest, "model-2.safetensors")


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]"])
def test_a_file_that_is_no_safetensors(float_qwen, source, dest, content):
    save_shards(float_qwen, source)
    (source / "model-0.safetensors").write_bytes(content)
    refuse(source, dest, "model-0.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_norm.weight",
        # The experts of a whole layer.
        "model.layers.2.mlp.switch_mlp.up_proj.weight",
    ],
)
def test_a_tensor_is_missing(float_qwen, source, dest, name):
    rewrite(float_qwen, source, lambda arrays: arrays.pop(name))
    refuse(source, dest, name)


def test_one_expert_is_missing(source, dest):
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    rewrite(GOLDEN / "qwen3_5_moe", source, lambda arrays: arrays.pop(name))
    refuse(source, dest, "layers.1", "up_proj", bits=32)


def test_a_tensor_that_nobody_knows(float_qwen, source, dest):
    extra = "model.layers.1.mlp.surprise.weight"
    rewrite(float_qwen, source, lambda arrays: arrays.update({extra: mx.zeros((64, 64))}))
    refuse(source, dest, extra)


def test_a_tensor_of_another_shape(float_qwen, source, dest):
    name = "model.norm.weight"
    rewrite(float_qwen, source, lambda arrays: arrays.update({name: mx.ones(65)}))
    refuse(source, dest, name)


def test_no_weights(float_qwen, source, dest):
    source.mkdir()
    shutil.copy(float_qwen / "config.json", source)
    refuse(source, dest, str(source))


def test_no_config(float_qwen, source, dest):
    source.mkdir()
    shutil.copy(float_qwen / "model.safetensors", source)
    refuse(source, dest, "config.json")


def test_no_checkpoint(tmp_path, dest):
    refuse(tmp_path / "nowhere", dest, "nowhere")


def test_an_unknown_family(float_qwen, source, dest):
    shutil.copytree(float_qwen, source)
    edit_config(source, model_type="from_the_future")
    refuse(source, dest, "from_the_future")


def test_a_dense_model(source, dest):
    config = {**FAMILIES["qwen3_moe"], "mlp_only_layers": [0, 1, 2]}
    save_float(source, config)
    refuse(source, dest, "qwen3_moe", "no routed experts")


def test_quantized_activations(source, dest):
    save_checkpoint(source, "qwen3_moe", mode="nvfp4", group_size=None)
    edit_config(source, quantize_activations=True)
    refuse(source, dest, "activations")
