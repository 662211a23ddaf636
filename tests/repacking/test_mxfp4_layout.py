"""Experts as gpt-oss ships them: mxfp4 blocks and scales, gate and up fused and interleaved."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx

import flashmoe
from flashmoe import FlashMoEModel
from tests.support.families import load_resident, save_checkpoint

TOKENS = mx.array([[3, 14, 15, 92, 65, 35, 89, 79]])
BLOCK_BYTES = 16


def to_published_layout(folder: Path) -> None:
    """Rewrite an mxfp4 MLX checkpoint in the layout and config that OpenAI published."""
    tensors = mx.load(str(folder / "model.safetensors"))
    published = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            published[name] = tensor
            continue
        prefix, projection, part = name.rsplit(".", 2)
        if projection == "down_proj":
            published[f"{prefix}.{projection}{SUFFIX[part]}"] = as_published(tensor, part)
        elif projection == "gate_proj":
            up = tensors[f"{prefix}.up_proj.{part}"]
            pairs = mx.stack([tensor, up], axis=2).reshape(tensor.shape[0], -1, *tensor.shape[2:])
            published[f"{prefix}.gate_up_proj{SUFFIX[part]}"] = as_published(pairs, part)
    mx.save_safetensors(str(folder / "model.safetensors"), published)
    (folder / "model.safetensors.index.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization")
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))


SUFFIX = {"weight": "_blocks", "scales": "_scales", "bias": "_bias"}


def as_published(tensor: mx.array, part: str) -> mx.array:
    """uint32 words [n_experts, rows, words] -> bytes [n_experts, rows, blocks, 16]."""
    if part != "weight":
        return tensor
    return tensor.view(mx.uint8).reshape(*tensor.shape[:2], -1, BLOCK_BYTES)


def test_published_layout_streams_like_the_resident_model(tmp_path: Path) -> None:
    folder = tmp_path / "gpt-oss"
    save_checkpoint(folder, "gpt_oss", bits=4, group_size=32, mode="mxfp4")
    expert_tensors = {
        name: tensor
        for name, tensor in mx.load(str(folder / "model.safetensors")).items()
        if ".experts." in name
    }
    # Only the experts are quantized in what was published.
    floats = tmp_path / "floats"
    save_checkpoint(floats, "gpt_oss", bits=None)
    rest = {
        name: tensor
        for name, tensor in mx.load(str(floats / "model.safetensors")).items()
        if ".experts." not in name
    }
    mx.save_safetensors(str(folder / "model.safetensors"), {**rest, **expert_tensors})
    to_published_layout(folder)
    expected = load_resident(folder)(TOKENS)
    store = flashmoe.repack(folder, tmp_path / "store")
    layer = store.manifest.layers[0].layout
    assert {q.mode for q in layer.projections.values()} == {"mxfp4"}
    assert "up_proj.bias" in {component.name for component in layer.record.components}
    with FlashMoEModel(store, cache="min", kernel="reference") as model:
        assert bool(mx.array_equal(model.model(TOKENS), expected))
