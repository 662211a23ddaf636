import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import (
    as_tensor,
    checkpoint_tensors,
    edit_config,
    mlx_arrays,
    save_float,
    save_quantized,
    store_tensors,
)
from families import FAMILIES, build_model, save_checkpoint
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_model
from safetensors import safe_open

from flashmoe import OptionError, SourceError, StoreError, repack, verify
from flashmoe.checkpoint.architecture import build_model as build_lazily
from flashmoe.store.layout import Quantization
from flashmoe.store.reader import is_store

GOLDEN = Path(__file__).parent / "golden"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Expert widths of 128, so that groups of 128 divide them.
WIDE = {**FAMILIES["qwen3_moe"], "hidden_size": 128, "moe_intermediate_size": 128}


@pytest.fixture(scope="module")
def float_qwen(tmp_path_factory):
    """qwen3_moe in float32: layer 0 is dense, layers 1 and 2 have 8 experts."""
    folder = tmp_path_factory.mktemp("float_qwen")
    save_checkpoint(folder, "qwen3_moe", bits=None)
    return folder


@pytest.fixture(scope="module")
def wide_qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide_qwen")
    save_float(folder, WIDE)
    return folder


@pytest.fixture
def dest(tmp_path):
    return tmp_path / "out.flashmoe"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_says(error, *words):
    """The error's text is one line that has every word in it."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    for word in words:
        assert word in text


def mlx_lm_tensors(checkpoint, folder, **options):
    """The tensors of the checkpoint quantized by mlx-lm, as `mlx_lm.convert` writes them."""
    model, config = load_model(checkpoint)
    model, _ = quantize_model(model, config, **options)
    folder.mkdir(exist_ok=True)
    save_model(folder, model)
    return checkpoint_tensors(folder)


# A quantized checkpoint, bit for bit.


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"dtype": mx.bfloat16}),
        ("qwen3_moe", {"dtype": mx.float16, "bits": 8, "group_size": 32}),
        ("qwen3_moe", {"mode": "mxfp4", "group_size": None}),
        ("qwen3_moe", {"mode": "mxfp8", "group_size": None, "bits": 8}),
        ("qwen3_moe", {"mode": "nvfp4", "group_size": None}),
        ("gpt_oss", {}),
        ("gpt_oss", {"mode": "mxfp4", "group_size": None, "dtype": mx.bfloat16}),
        ("ernie4_5_moe", {"bits": 6, "group_size": 32}),
        ("nemotron_h", {"bits": 5}),
        ("phixtral", {}),
        ("deepseek_v3", {"bits": 3, "dtype": mx.bfloat16}),
    ],
    ids=str,
)
def test_a_quantized_checkpoint_is_repacked_bit_for_bit(tmp_path, dest, family, options):
    source = tmp_path / "source"
    source.mkdir()
    save_checkpoint(source, family, **options)
    store = repack(source, dest)
    assert store_tensors(store) == checkpoint_tensors(source)
    mode, bits = options.get("mode", "affine"), options.get("bits", 4)
    group_size = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}.get(mode, options.get("group_size", 64))
    assert store.manifest.layers
    for layer in store.manifest.layers:
        assert set(layer.layout.projections.values()) == {Quantization(bits, group_size, mode)}
    verify(dest)


@pytest.mark.parametrize("family", ["gpt_oss", "ernie4_5_moe"])
def test_biases_of_experts_are_in_their_records(tmp_path, dest, family):
    source = tmp_path / "source"
    source.mkdir()
    save_checkpoint(source, family, dtype=mx.bfloat16)
    layout = repack(source, dest).manifest.layers[0].layout
    parts = ("weight", "scales", "biases", "bias")
    assert [c.name for c in layout.record.components] == [
        f"{projection}.{part}" for projection in PROJECTIONS for part in parts
    ]


def test_bits_mixed_per_tensor(tmp_path, dest):
    def predicate(path, module):
        if "switch_mlp" in path:
            down = path.endswith("down_proj")
            return {"bits": 6, "group_size": 64} if down else {"bits": 3, "group_size": 32}
        if path.endswith("mlp.gate"):
            return {"bits": 8, "group_size": 64}
        if path.endswith("self_attn.k_proj"):
            return {"bits": 5, "group_size": 32}
        return not path.endswith("self_attn.v_proj")

    source = tmp_path / "source"
    source.mkdir()
    save_quantized(
        source, FAMILIES["qwen3_moe"], bits=4, group_size=64, predicate=predicate, dtype=mx.bfloat16
    )
    store = repack(source, dest)
    assert store_tensors(store) == checkpoint_tensors(source)
    for layer in store.manifest.layers:
        assert layer.layout.projections == {
            "gate_proj": Quantization(3, 32),
            "up_proj": Quantization(3, 32),
            "down_proj": Quantization(6, 64),
        }
    resident = store.manifest.quantization
    assert resident["model.layers.1.mlp.gate"] == Quantization(8, 64)
    assert resident["model.layers.2.self_attn.k_proj"] == Quantization(5, 32)
    assert resident["model.layers.0.mlp.gate_proj"] == Quantization(4, 64)
    assert "model.layers.0.self_attn.v_proj" not in resident


def test_experts_in_floats_among_quantized_residents(tmp_path, dest):
    source = tmp_path / "source"
    source.mkdir()
    save_quantized(
        source,
        FAMILIES["qwen3_moe"],
        bits=4,
        group_size=64,
        predicate=lambda path, module: "down_proj" not in path,
    )
    store = repack(source, dest)
    assert store_tensors(store) == checkpoint_tensors(source)
    assert set(store.manifest.layers[0].layout.projections) == {"gate_proj", "up_proj"}


def test_a_mode_mixed_with_affine(tmp_path, dest):
    """gpt_oss as mlx-community has it: mxfp4 experts, 8-bit affine residents."""

    def predicate(path, module):
        if ".experts." in path:
            return {"bits": 4, "group_size": 32, "mode": "mxfp4"}
        return {"bits": 8, "group_size": 64, "mode": "affine"}

    source = tmp_path / "source"
    source.mkdir()
    save_quantized(source, FAMILIES["gpt_oss"], bits=8, group_size=64, predicate=predicate)
    store = repack(source, dest)
    assert store_tensors(store) == checkpoint_tensors(source)
    assert set(store.manifest.layers[0].layout.projections.values()) == {
        Quantization(4, 32, "mxfp4")
    }
    assert set(store.manifest.quantization.values()) == {Quantization(8, 64)}


@pytest.mark.parametrize("option", ["bits", "group_size", "resident_bits"])
def test_a_quantized_checkpoint_takes_no_precision(tmp_path, dest, option):
    source = tmp_path / "source"
    source.mkdir()
    save_checkpoint(source, "qwen3_moe")
    with pytest.raises(OptionError) as error:
        repack(source, dest, **{option: 32})
    assert_says(error, str(source), "already quantized")
    assert not dest.exists()


# A float checkpoint.


@pytest.mark.parametrize(
    ("bits", "group_size"),
    [(2, 32), (2, 128), (3, 64), (4, 32), (4, 64), (4, 128), (5, 64), (6, 32), (6, 128), (8, 64)],
)
def test_floats_are_quantized_as_mlx_does(wide_qwen, tmp_path, dest, bits, group_size):
    store = repack(wide_qwen, dest, bits=bits, group_size=group_size)
    stored = store_tensors(store)
    source = mlx_arrays(wide_qwen)
    for layer in store.manifest.layers:
        assert set(layer.layout.projections.values()) == {Quantization(bits, group_size)}
        for projection in PROJECTIONS:
            name = f"{layer.layout.path}.{projection}"
            parts = mx.quantize(source[f"{name}.weight"], group_size=group_size, bits=bits)
            for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
                assert stored[f"{name}.{part}"] == as_tensor(array)
    assert stored == mlx_lm_tensors(
        wide_qwen, tmp_path / "mlx_lm", group_size=group_size, bits=bits
    )


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("deepseek_v3", mx.float32),
        ("gpt_oss", mx.bfloat16),
        ("nemotron_h", mx.float32),
        ("qwen3_5_moe", mx.bfloat16),
        ("qwen3_next", mx.float16),
    ],
    ids=str,
)
def test_quantizing_equals_mlx_lm_by_default(tmp_path, dest, family, dtype):
    source = tmp_path / "source"
    source.mkdir()
    save_checkpoint(source, family, bits=None, dtype=dtype)
    store = repack(source, dest)
    expected = mlx_lm_tensors(source, tmp_path / "mlx_lm", group_size=64, bits=4)
    assert store_tensors(store) == expected


def test_routers_keep_the_bits_that_the_family_wants(tmp_path, dest):
    source = tmp_path / "source"
    source.mkdir()
    save_checkpoint(source, "qwen3_next", bits=None)
    manifest = repack(source, dest, bits=3, resident_bits=2).manifest
    assert manifest.quantization["model.layers.1.mlp.gate"] == Quantization(8, 64)
    assert manifest.quantization["model.layers.2.mlp.gate"] == Quantization(8, 64)
    assert manifest.quantization["model.embed_tokens"] == Quantization(2, 64)
    assert manifest.layers[0].layout.projections["up_proj"] == Quantization(3, 64)


def test_routers_that_the_family_keeps_in_floats_stay_so(tmp_path, dest):
    source = tmp_path / "source"
    source.mkdir()
    save_checkpoint(source, "deepseek_v3", bits=None)
    store = repack(source, dest, bits=2)
    tensors = store_tensors(store)
    source_tensors = checkpoint_tensors(source)
    for part in ("weight", "e_score_correction_bias"):
        name = f"model.layers.1.mlp.gate.{part}"
        assert tensors[name] == source_tensors[name]


def test_resident_bits_differ_from_the_experts(float_qwen, dest):
    store = repack(float_qwen, dest, bits=2, resident_bits=8)
    assert set(store.manifest.quantization.values()) == {Quantization(8, 64)}
    assert store.manifest.layers[0].layout.projections["down_proj"] == Quantization(2, 64)
    source = mlx_arrays(float_qwen)
    packed = mx.quantize(source["lm_head.weight"], group_size=64, bits=8)
    stored = store_tensors(store)
    for part, array in zip(("weight", "scales", "biases"), packed, strict=True):
        assert stored[f"lm_head.{part}"] == as_tensor(array)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_32_bits_keep_every_byte(tmp_path, dest, dtype):
    source = tmp_path / "source"
    source.mkdir()
    save_checkpoint(source, "gpt_oss", bits=None, dtype=dtype)
    store = repack(source, dest, bits=32)
    assert store_tensors(store) == checkpoint_tensors(source)
    assert store.manifest.quantization == {}
    assert store.manifest.layers[0].layout.projections == {}


def test_16_bits_round_float32_to_bfloat16(tmp_path, dest):
    source = tmp_path / "source"
    source.mkdir()
    save_checkpoint(source, "deepseek_v3", bits=None)
    stored = store_tensors(repack(source, dest, bits=16))
    arrays = mlx_arrays(source)
    assert stored.keys() == arrays.keys()
    for name, array in arrays.items():
        kept = name.endswith("e_score_correction_bias")  # what the family's cast_predicate keeps
        assert stored[name] == as_tensor(array if kept else array.astype(mx.bfloat16)), name


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_16_bits_keep_16_bit_floats(tmp_path, dest, dtype):
    source = tmp_path / "source"
    source.mkdir()
    save_checkpoint(source, "qwen3_moe", bits=None, dtype=dtype)
    assert store_tensors(repack(source, dest, bits=16)) == checkpoint_tensors(source)


@pytest.mark.parametrize("resident_bits", [16, 32])
def test_quantized_experts_among_float_residents(float_qwen, dest, resident_bits):
    store = repack(float_qwen, dest, bits=4, resident_bits=resident_bits)
    assert store.manifest.quantization == {}
    source = mlx_arrays(float_qwen)
    stored = store_tensors(store)
    wanted = mx.bfloat16 if resident_bits == 16 else mx.float32
    for shard in store.manifest.resident:
        for tensor in shard.tensors:
            assert stored[tensor.name] == as_tensor(source[tensor.name].astype(wanted))
    name = f"{store.manifest.layers[0].layout.path}.up_proj"
    # The experts are quantized from float32, not from rounded residents.
    packed = mx.quantize(source[f"{name}.weight"], group_size=64, bits=4)
    assert stored[f"{name}.weight"] == as_tensor(packed[0])
    assert stored[f"{name}.scales"] == as_tensor(packed[1])


def test_float_experts_among_quantized_residents(float_qwen, dest):
    store = repack(float_qwen, dest, bits=32, resident_bits=4)
    stored, source = store_tensors(store), checkpoint_tensors(float_qwen)
    for layer in store.manifest.layers:
        assert layer.layout.projections == {}
        for projection in PROJECTIONS:
            name = f"{layer.layout.path}.{projection}.weight"
            assert stored[name] == source[name]
    assert store.manifest.quantization["lm_head"] == Quantization(4, 64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 7}, ("bits must be one of", "7")),
        ({"bits": 0}, ("bits must be one of", "0")),
        ({"bits": -4}, ("bits must be one of", "-4")),
        ({"resident_bits": 1}, ("resident bits must be one of", "1")),
        ({"group_size": 16}, ("group size must be one of", "16")),
        ({"group_size": 0}, ("group size must be one of", "0")),
    ],
    ids=str,
)
def test_impossible_precisions(float_qwen, dest, options, words):
    with pytest.raises(OptionError) as error:
        repack(float_qwen, dest, **options)
    assert_says(error, *words)
    assert not dest.exists()


def test_a_group_size_that_does_not_divide_the_experts(float_qwen, dest):
    with pytest.raises(OptionError) as error:
        repack(float_qwen, dest, group_size=128)
    assert_says(error, "model.layers.1.mlp.switch_mlp.gate_proj", "64", "128")
    assert not dest.exists()


# What a store says of its source.


def test_a_repack_is_deterministic(float_qwen, tmp_path):
    stores = [repack(float_qwen, tmp_path / name, bits=5).path for name in ("one", "two")]
    files = [
        {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}
        for store in stores
    ]
    assert files[0] == files[1]
    assert {"flashmoe.json", "config.json", "experts/layer-000.safetensors"} <= files[0].keys()


def test_source_identity(tmp_path, dest):
    source = tmp_path / "Some-MoE"
    source.mkdir()
    save_checkpoint(source, "qwen3_moe")
    for name in ("tokenizer.json", "LICENSE", "merges.txt", "chat_template.jinja"):
        (source / name).write_text(f'"{name}"')
    (source / "modeling.py").write_text("raise SystemExit")
    manifest = repack(source, dest).manifest
    assert (manifest.source.repo, manifest.source.revision) == ("Some-MoE", None)
    copied = {"config.json", "tokenizer.json", "LICENSE", "merges.txt", "chat_template.jinja"}
    assert manifest.copied.keys() == copied
    assert manifest.source.files == {
        name: sha256(source / name) for name in [*copied, "model.safetensors"]
    }
    for name, digest in manifest.copied.items():
        assert digest == sha256(dest / name) == sha256(source / name)


def test_the_default_destination(float_qwen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = repack(float_qwen)
    assert store.path.resolve() == tmp_path / f"{float_qwen.name}.flashmoe"


def test_progress_counts_the_bytes_of_tensors(float_qwen, dest):
    calls = []
    store = repack(float_qwen, dest, progress=lambda done, total: calls.append((done, total)))
    total = sum(len(content) for _, _, content in store_tensors(store).values())
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    done = [done for done, _ in calls]
    assert done == sorted(set(done))


# How checkpoints lay experts out.


def source_array(folder, name):
    with safe_open(folder / "model.safetensors", "np") as file:
        return file.get_tensor(name)


def record_array(store, layer, component):
    """A float32 component of all experts, from the records."""
    layout = store.manifest.layers[layer].layout
    dtype, shape, content = store_tensors(store)[f"{layout.path}.{component}"]
    assert dtype == "F32"
    return np.frombuffer(content, np.float32).reshape(shape)


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
        expected = {
            "gate_proj.weight": gate_up[:, 0::2],
            "gate_proj.bias": gate_up_bias[:, 0::2],
            "up_proj.weight": gate_up[:, 1::2],
            "up_proj.bias": gate_up_bias[:, 1::2],
            "down_proj.weight": down,
            "down_proj.bias": source_array(folder, f"{prefix}.down_proj_bias"),
        }
        for name, array in expected.items():
            np.testing.assert_array_equal(record_array(store, layer, name), array)


def test_fused_experts_in_halves(dest):
    folder = GOLDEN / "granitemoe"  # [experts, out, in], gate above up
    store = repack(folder, dest, bits=32)
    for layer in range(2):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        gate, up = np.split(source_array(folder, f"{prefix}.input_linear.weight"), 2, axis=1)
        down = source_array(folder, f"{prefix}.output_linear.weight")
        for name, array in (("gate", gate), ("up", up), ("down", down)):
            records = record_array(store, layer, f"{name}_proj.weight")
            np.testing.assert_array_equal(records, array)


def test_the_released_layout_of_qwen3_5(dest):
    folder = GOLDEN / "qwen3_5_moe_vl"
    store = repack(folder, dest, bits=32)
    assert not any("visual" in name for name in store_tensors(store))
    for layer in range(len(store.manifest.layers)):
        prefix = f"model.language_model.layers.{layer}.mlp.experts"
        gate, up = np.split(source_array(folder, f"{prefix}.gate_up_proj"), 2, axis=1)
        down = source_array(folder, f"{prefix}.down_proj")
        for name, array in (("gate", gate), ("up", up), ("down", down)):
            records = record_array(store, layer, f"{name}_proj.weight")
            np.testing.assert_array_equal(records, array)


def test_a_checkpoint_in_many_shards(float_qwen, tmp_path, dest):
    source = tmp_path / "source"
    sharded(float_qwen, source)
    store = repack(source, dest, bits=32)
    assert store_tensors(store) == checkpoint_tensors(float_qwen)
    assert {"model-0.safetensors", "model-1.safetensors", "model-2.safetensors"} <= set(
        store.manifest.source.files
    )


# Checkpoints that are not whole.


def sharded(source, folder, n_shards=3):
    """The checkpoint's tensors spread over shards, with an index."""
    folder.mkdir()
    arrays = mlx_arrays(source)
    names = sorted(arrays)
    weight_map = {}
    for shard in range(n_shards):
        part = {name: arrays[name] for name in names[shard::n_shards]}
        mx.save_safetensors(str(folder / f"model-{shard}.safetensors"), part)
        weight_map |= dict.fromkeys(part, f"model-{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(source / "config.json", folder)


def rewritten(source, folder, change):
    """A copy of a one-file checkpoint whose tensors `change(arrays)` has edited."""
    folder.mkdir()
    arrays = mlx_arrays(source)
    change(arrays)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    shutil.copy(source / "config.json", folder)


def refused(source, dest, *words):
    with pytest.raises(SourceError) as error:
        repack(source, dest)
    assert_says(error, *words)
    assert not dest.exists()


def test_a_shard_that_the_index_lists_is_missing(float_qwen, tmp_path, dest):
    source = tmp_path / "source"
    sharded(float_qwen, source)
    (source / "model-1.safetensors").unlink()
    refused(source, dest, "model-1.safetensors")


@pytest.mark.parametrize("lost_bytes", [1, 100_000, 400_000])
def test_a_truncated_shard(float_qwen, tmp_path, dest, lost_bytes):
    source = tmp_path / "source"
    sharded(float_qwen, source)
    path = source / "model-2.safetensors"
    os.truncate(path, max(9, path.stat().st_size - lost_bytes))
    refused(source, dest, "model-2.safetensors")


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]"])
def test_a_file_that_is_no_safetensors(float_qwen, tmp_path, dest, content):
    source = tmp_path / "source"
    sharded(float_qwen, source)
    (source / "model-0.safetensors").write_bytes(content)
    refused(source, dest, "model-0.safetensors")


def test_a_tensor_is_missing(float_qwen, tmp_path, dest):
    name = "model.layers.1.self_attn.q_norm.weight"
    rewritten(float_qwen, tmp_path / "source", lambda arrays: arrays.pop(name))
    refused(tmp_path / "source", dest, name)


def test_the_experts_of_a_layer_are_missing(float_qwen, tmp_path, dest):
    name = "model.layers.2.mlp.switch_mlp.up_proj.weight"
    rewritten(float_qwen, tmp_path / "source", lambda arrays: arrays.pop(name))
    refused(tmp_path / "source", dest, name)


def test_one_expert_is_missing(tmp_path, dest):
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    rewritten(GOLDEN / "qwen3_5_moe", tmp_path / "source", lambda arrays: arrays.pop(name))
    with pytest.raises(SourceError) as error:
        repack(tmp_path / "source", dest, bits=32)
    assert_says(error, "layers.1", "up_proj")
    assert not dest.exists()


def test_a_tensor_that_nobody_knows(float_qwen, tmp_path, dest):
    extra = "model.layers.1.mlp.surprise.weight"
    rewritten(
        float_qwen, tmp_path / "source", lambda arrays: arrays.update({extra: mx.zeros((64, 64))})
    )
    refused(tmp_path / "source", dest, extra)


def test_a_tensor_of_another_shape(float_qwen, tmp_path, dest):
    name = "model.norm.weight"
    rewritten(float_qwen, tmp_path / "source", lambda arrays: arrays.update({name: mx.ones(65)}))
    refused(tmp_path / "source", dest, name)


def test_no_weights(float_qwen, tmp_path, dest):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(float_qwen / "config.json", source)
    refused(source, dest, str(source))


def test_no_config(float_qwen, tmp_path, dest):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(float_qwen / "model.safetensors", source)
    refused(source, dest, "config.json")


def test_no_checkpoint(tmp_path, dest):
    refused(tmp_path / "nowhere", dest, "nowhere")


def test_an_unknown_family(float_qwen, tmp_path, dest):
    shutil.copytree(float_qwen, tmp_path / "source")
    edit_config(tmp_path / "source", model_type="from_the_future")
    refused(tmp_path / "source", dest, "from_the_future")


def test_a_dense_model(tmp_path, dest):
    source = tmp_path / "source"
    source.mkdir()
    config = {**FAMILIES["qwen3_moe"], "mlp_only_layers": [0, 1, 2]}
    save_model(source, build_model(config, 0))
    (source / "config.json").write_text(json.dumps(config))
    refused(source, dest, "qwen3_moe", "no routed experts")


def test_quantized_activations(tmp_path, dest):
    source = tmp_path / "source"
    source.mkdir()
    save_checkpoint(source, "qwen3_moe", mode="nvfp4", group_size=None)
    edit_config(source, quantize_activations=True)
    refused(source, dest, "activations")


# A disk that is full.


def test_a_full_disk_is_noticed_before_writing(float_qwen, dest, monkeypatch):
    usage = shutil.disk_usage(dest.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
        with pytest.raises(StoreError) as error:
            repack(float_qwen, dest)
    assert_says(error, str(dest), "free")
    assert not is_store(dest)
    assert repack(float_qwen, dest).manifest.layers


@pytest.mark.parametrize("call", ["pwrite", "write"])
def test_a_disk_that_fills_up_while_writing(float_qwen, dest, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StoreError) as error:
            repack(float_qwen, dest)
    assert_says(error, str(dest), os.strerror(errno.ENOSPC))
    assert not is_store(dest)
    assert repack(float_qwen, dest).manifest.layers


def test_a_full_disk_while_the_manifest_is_written(float_qwen, dest, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(StoreError) as error:
            repack(float_qwen, dest)
    assert_says(error, str(dest), os.strerror(errno.ENOSPC))
    assert not is_store(dest)


def test_an_existing_store_is_replaced_only_by_force(float_qwen, dest):
    repack(float_qwen, dest, bits=8)
    with pytest.raises(StoreError) as error:
        repack(float_qwen, dest, bits=4)
    assert_says(error, str(dest), "--force")
    assert repack(float_qwen, dest, bits=4, force=True).manifest.layers[0].layout.projections[
        "up_proj"
    ] == Quantization(4, 64)


# Memory.

# 8 experts of 3 * 512 * 384 float32 numbers in each layer: 19 MB.
LAYER_BYTES = 8 * 3 * 512 * 384 * 4
ALLOWANCE_BYTES = 40_000_000

MEASURE = """
import sys
from flashmoe.machine import peak_resident_set_bytes, resident_set_bytes
from flashmoe.repacking.execute import repack

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
        model, _ = build_lazily(config)
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
    assert max(peaks.values()) < LAYER_BYTES + ALLOWANCE_BYTES
    assert abs(peaks[12] - peaks[6]) < 10_000_000
