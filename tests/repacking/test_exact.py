"""A quantized checkpoint is repacked bit for bit, whatever its bits, mode and family."""

import mlx.core as mx
import pytest

from flashmoe import OptionError, repack, verify
from flashmoe.store.layout import Quantization
from tests.support.checkpoints import PROJECTIONS, checkpoint_tensors, save_quantized, store_tensors
from tests.support.families import FAMILIES, save_checkpoint
from tests.support.refusals import refused


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
def test_a_quantized_checkpoint_is_repacked_bit_for_bit(source, dest, family, options):
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
def test_biases_of_experts_are_in_their_records(source, dest, family):
    save_checkpoint(source, family, dtype=mx.bfloat16)
    layout = repack(source, dest).manifest.layers[0].layout
    parts = ("weight", "scales", "biases", "bias")
    assert [c.name for c in layout.record.components] == [
        f"{projection}.{part}" for projection in PROJECTIONS for part in parts
    ]


def test_bits_mixed_per_tensor(source, dest):
    def predicate(path, module):
        if "switch_mlp" in path:
            down = path.endswith("down_proj")
            return {"bits": 6, "group_size": 64} if down else {"bits": 3, "group_size": 32}
        if path.endswith("mlp.gate"):
            return {"bits": 8, "group_size": 64}
        if path.endswith("self_attn.k_proj"):
            return {"bits": 5, "group_size": 32}
        return not path.endswith("self_attn.v_proj")

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


def test_experts_in_floats_among_quantized_residents(source, dest):
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


def test_a_mode_mixed_with_affine(source, dest):
    """gpt_oss as mlx-community has it: mxfp4 experts, 8-bit affine residents."""

    def predicate(path, module):
        if ".experts." in path:
            return {"bits": 4, "group_size": 32, "mode": "mxfp4"}
        return {"bits": 8, "group_size": 64, "mode": "affine"}

    save_quantized(source, FAMILIES["gpt_oss"], bits=8, group_size=64, predicate=predicate)
    store = repack(source, dest)
    assert store_tensors(store) == checkpoint_tensors(source)
    assert set(store.manifest.layers[0].layout.projections.values()) == {
        Quantization(4, 32, "mxfp4")
    }
    assert set(store.manifest.quantization.values()) == {Quantization(8, 64)}


@pytest.mark.parametrize("option", ["bits", "group_size", "resident_bits"])
def test_a_quantized_checkpoint_takes_no_precision(source, dest, option):
    save_checkpoint(source, "qwen3_moe")
    with refused(OptionError, str(source), "already quantized"):
        repack(source, dest, **{option: 32})
    assert not dest.exists()


def test_a_quantized_checkpoint_may_be_kept_as_it_is(source, dest):
    save_checkpoint(source, "qwen3_moe")
    assert store_tensors(repack(source, dest, recipe="as-is")) == checkpoint_tensors(source)
