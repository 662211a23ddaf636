"""A float checkpoint is quantized, or rounded, exactly as MLX and mlx-lm do it."""

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model, quantize_model, save_model

from flashmoe import OptionError, repack
from flashmoe.repacking import plan
from flashmoe.store.layout import Quantization
from flashmoe.store.verify import verify
from tests.support.checkpoints import (
    GOLDEN,
    PROJECTIONS,
    as_tensor,
    checkpoint_tensors,
    mlx_arrays,
    save_float,
    store_tensors,
)
from tests.support.families import FAMILIES, save_checkpoint
from tests.support.refusals import refused

# Widths of 128, so that groups of 128 divide them.
WIDE = {**FAMILIES["qwen3_moe"], "hidden_size": 128, "moe_intermediate_size": 128}


@pytest.fixture(scope="module")
def wide_qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide_qwen")
    save_float(folder, WIDE)
    return folder


def mlx_lm_tensors(checkpoint, folder, **options):
    """The tensors of the checkpoint quantized by mlx-lm, as `mlx_lm.convert` writes them."""
    model, config = load_model(checkpoint)
    model, _ = quantize_model(model, config, **options)
    folder.mkdir(exist_ok=True)
    save_model(folder, model)
    return checkpoint_tensors(folder)


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


def test_zeros_are_quantized_as_any_weights(tmp_path, source, dest):
    save_float(source, WIDE)
    arrays = mlx_arrays(source)
    for name, array in arrays.items():
        # Of one shape in two layers, and negative zeros, which are other bytes.
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            arrays[name] = mx.zeros_like(array)
        elif name.endswith("down_proj.weight"):
            arrays[name] = -mx.zeros_like(array)
    mx.save_safetensors(str(source / "model.safetensors"), arrays, {"format": "mlx"})
    expected = mlx_lm_tensors(source, tmp_path / "mlx_lm", group_size=64, bits=4)
    assert store_tensors(repack(source, dest)) == expected


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
def test_quantizing_equals_mlx_lm_by_default(tmp_path, source, dest, family, dtype):
    save_checkpoint(source, family, bits=None, dtype=dtype)
    store = repack(source, dest)
    expected = mlx_lm_tensors(source, tmp_path / "mlx_lm", group_size=64, bits=4)
    assert store_tensors(store) == expected


def test_routers_keep_the_bits_that_the_family_wants(source, dest):
    save_checkpoint(source, "qwen3_next", bits=None)
    manifest = repack(source, dest, bits=3, resident_bits=2).manifest
    assert manifest.quantization["model.layers.1.mlp.gate"] == Quantization(8, 64)
    assert manifest.quantization["model.layers.2.mlp.gate"] == Quantization(8, 64)
    assert manifest.quantization["model.embed_tokens"] == Quantization(2, 64)
    assert manifest.layers[0].layout.projections["up_proj"] == Quantization(3, 64)


def test_groups_that_the_family_wants_but_rows_are_too_short_for(dest):
    layer = repack(GOLDEN / "granitemoe", dest, bits=4, group_size=32).manifest.layers[0].layout
    assert layer.projections["down_proj"] == Quantization(8, 32)
    assert layer.projections["gate_proj"] == Quantization(4, 32)


def test_routers_that_the_family_keeps_in_floats_stay_so(source, dest):
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
def test_32_bits_keep_every_byte(source, dest, dtype):
    save_checkpoint(source, "gpt_oss", bits=None, dtype=dtype)
    store = repack(source, dest, bits=32)
    assert store_tensors(store) == checkpoint_tensors(source)
    assert store.manifest.quantization == {}
    assert store.manifest.layers[0].layout.projections == {}


def test_16_bits_round_float32_to_bfloat16(source, dest):
    save_checkpoint(source, "deepseek_v3", bits=None)
    stored = store_tensors(repack(source, dest, bits=16))
    arrays = mlx_arrays(source)
    assert stored.keys() == arrays.keys()
    for name, array in arrays.items():
        kept = name.endswith("e_score_correction_bias")  # what the family's cast_predicate keeps
        assert stored[name] == as_tensor(array if kept else array.astype(mx.bfloat16)), name


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_16_bits_keep_16_bit_floats(source, dest, dtype):
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
        ({"group_size": 128}, ("model.layers.1.mlp.switch_mlp.gate_proj", "64", "128")),
    ],
    ids=str,
)
def test_impossible_precisions(float_qwen, dest, options, words):
    with refused(OptionError, *words):
        repack(float_qwen, dest, **options)
    assert not dest.exists()


def test_a_weight_and_its_scales_may_be_in_different_files(wide_qwen, tmp_path, dest, monkeypatch):
    expected = store_tensors(repack(wide_qwen, tmp_path / "one.flashmoe", bits=4))
    monkeypatch.setattr(plan, "SHARD_BYTES", 1)
    store = repack(wide_qwen, dest, bits=4)
    assert all(len(shard.tensors) == 1 for shard in store.manifest.resident)
    assert store_tensors(store) == expected
    verify(store.path)
