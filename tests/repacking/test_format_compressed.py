"""compressed-tensors: every kind of layer in one checkpoint, packed by the package itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flashmoe import FlashMoEModel, SourceError, repack
from flashmoe.checkpoint.headers import TensorInfo
from flashmoe.repacking.formats.compressed import present
from flashmoe.repacking.formats.contract import Packed
from flashmoe.store.layout import Quantization
from tests.support.checkpoints import mlx_arrays, store_tensors
from tests.support.format_cases import FORMATS, digest, digests, unpacked
from tests.support.refusals import refused

CASE = FORMATS / "compressed_qwen3_moe"
ATTENTION = "model.layers.0.self_attn"
EXPERT = "model.layers.0.mlp.experts.1"


def floats(arrays: dict[str, mx.array], path: str) -> mx.array:
    """A layer as float32, scale * code + bias in that precision."""
    weight, scales = arrays[f"{path}.weight"], arrays.get(f"{path}.scales")
    if scales is None:
        return weight.astype(mx.float32)
    if scales.dtype == mx.uint8:
        return mx.dequantize(weight, scales, None, 32, 4, "mxfp4", dtype=mx.float32)
    biases = arrays[f"{path}.biases"].astype(mx.float32)
    bits = 4 if ".experts." in path else 8
    return mx.dequantize(weight, scales.astype(mx.float32), biases, 32, bits)


@pytest.mark.parametrize(
    "path",
    [
        *(f"{EXPERT}.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
        *(f"{ATTENTION}.{name}" for name in ("q_proj", "k_proj", "o_proj")),
        "lm_head",
    ],
)
def test_weights_are_what_the_package_unpacks(path: str) -> None:
    found = digest(floats(unpacked(CASE), path).astype(mx.bfloat16))
    assert found == digests(CASE)[f"{path}.weight"]


def test_zeros_are_rounded_once() -> None:
    """A bias, -scale * zero, is of the dtype of the scales."""
    arrays = unpacked(CASE)
    path = f"{ATTENTION}.v_proj"
    biases = arrays[f"{path}.biases"].astype(mx.float32)
    expected = mx.load(str(CASE / "golden.safetensors"))["v_proj"].astype(mx.float32)
    # bfloat16 has 8 bits; the package rounds what it returns, too.
    error = mx.abs(floats(arrays, path) - expected)
    assert mx.all(error <= (mx.abs(biases[:, :1]) + mx.abs(expected)) * 2.0**-8).item()
    assert len(set(biases.reshape(-1).tolist())) > 8


def test_codes_are_the_same(dest: Path) -> None:
    store = repack(CASE, dest)
    given, stored = mlx_arrays(CASE), store_tensors(store)
    layer = store.manifest.layers[0].layout
    assert layer.projections == {
        "gate_proj": Quantization(4, 32, "affine"),
        "up_proj": Quantization(4, 32, "affine"),
        "down_proj": Quantization(4, 32, "mxfp4"),
    }
    for name in layer.projections:
        parts = [given[f"model.layers.0.mlp.experts.{i}.{name}.weight_packed"] for i in range(3)]
        content = b"".join(np.array(part).tobytes() for part in parts)
        assert stored[f"{layer.path}.{name}.weight"][2] == content
    assert store.manifest.quantization == {
        f"{ATTENTION}.{name}": Quantization(8, 32, "affine") for name in ("k_proj", "v_proj")
    }


def test_logits_are_those_of_transformers(dest: Path) -> None:
    golden = mx.load(str(CASE / "golden.safetensors"))
    with FlashMoEModel(repack(CASE, dest), cache="min") as model:
        logits = model.model(golden["prompt"][None])[0]
    difference = mx.abs(logits - golden["logits"]).max().item()
    # The zeros of v_proj differ by their rounding.
    assert difference < 0.05 < mx.abs(golden["logits"]).max().item()


def packed(tensors: dict[str, tuple[str, tuple[int, ...]]], **weights: Any) -> Packed:
    settings = {"config_groups": {"group_0": {"weights": weights}}} if weights else {}
    infos = {name: TensorInfo(dtype, shape, 0, 0) for name, (dtype, shape) in tensors.items()}
    return Packed("the checkpoint", settings, {}, infos, lambda name: b"")


INTEGERS = {"q.weight_packed": ("I32", (64, 8)), "q.weight_scale": ("BF16", (64, 2))}
REFUSED: dict[str, tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, Any], list[str]]] = {
    "nothing packed": ({"q.weight": ("BF16", (64, 64))}, {}, ["weight_packed"]),
    "no scheme": (INTEGERS, {}, ["q.weight_packed", "config_groups"]),
    "another scheme": (INTEGERS, {"num_bits": 4, "group_size": 64}, ["q.weight_packed"]),
    "bits that nobody has": (INTEGERS, {"num_bits": 7, "group_size": 32}, ["2, 3, 4, 8"]),
    "scales of other rows": (
        {**INTEGERS, "q.weight_scale": ("BF16", (32, 2))},
        {"num_bits": 4, "group_size": 32},
        ["q.weight_scale"],
    ),
    "no scales": ({"q.weight_packed": ("I32", (64, 8))}, {"num_bits": 4}, ["q.weight_scale"]),
    "nvfp4 without scales": (
        {"q.weight_packed": ("U8", (64, 32)), "q.weight_global_scale": ("F32", (1,))},
        {},
        ["q.weight_scale"],
    ),
    "half a block of mxfp4": (
        {"q.weight_packed": ("U8", (64, 24)), "q.weight_scale": ("U8", (64, 1))},
        {},
        ["q.weight_packed", "48 inputs", "32"],
    ),
    "bytes without a scale": (
        {"q.weight": ("I8", (64, 64)), "k.weight_scale": ("BF16", (1,))},
        {},
        ["q.weight_scale"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read(case: str) -> None:
    tensors, weights, words = REFUSED[case]
    with refused(SourceError, "the checkpoint", *words):
        present(packed(tensors, **weights))


def test_one_scale_for_all_bytes() -> None:
    """A scale per tensor, and a group of inputs that MLX has only by repeating its scale."""
    tensors = {"q.weight": ("I8", (4, 256)), "q.weight_scale": ("F32", (1,))}
    presentation = present(packed(tensors))
    codes = mx.arange(-128, 896, dtype=mx.int32).astype(mx.int8).reshape(4, 256)
    seen = presentation.of({"q.weight": codes, "q.weight_scale": mx.array([0.5])})
    assert set(seen) == {"q.weight", "q.scales", "q.biases"}
    assert seen["q.scales"].shape == (4, 2)
    values = mx.dequantize(seen["q.weight"], seen["q.scales"], seen["q.biases"], 128, 8)
    assert mx.array_equal(values, codes.astype(mx.float32) * 0.5)


def test_what_was_never_compressed() -> None:
    given = packed({"q.weight": ("BF16", (64, 64))})
    presentation = present(Packed("here", {"format": "dense"}, {}, given.tensors, given.read))
    assert (presentation.stand_ins, presentation.hidden) == ({}, frozenset())


def test_settings_that_are_no_tables() -> None:
    for settings in ({"config_groups": [1]}, {"config_groups": {"a": 1, "b": {"weights": None}}}):
        given = packed(INTEGERS)
        with refused(SourceError, "config_groups"):
            present(Packed("here", json.loads(json.dumps(settings)), {}, given.tensors, given.read))
