"""Exactness (c): logits and greedy tokens of Hugging Face transformers, at the minimum bank.

The checkpoints under golden/ are as transformers 5 writes them; golden/README.md says how they
were captured.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

import flashmoe
from flashmoe import FlashMoEModel

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors"))
REQUIRED = {
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "mixtral",
    "olmoe",
    "qwen3_5_moe",
    "qwen3_moe",
    "qwen3_next",
}
TOLERANCE = 1e-4


def test_every_required_family_is_there() -> None:
    assert set(FAMILIES) >= REQUIRED


@pytest.mark.parametrize("family", FAMILIES)
def test_golden(family: str, tmp_path: Path) -> None:
    golden = mx.load(str(GOLDEN / family / "golden.safetensors"))
    store = flashmoe.repack(GOLDEN / family, tmp_path / "store", bits=32)
    with FlashMoEModel(store, cache="min") as model:
        prompt = golden["prompt"][None]
        whole = model.model(prompt)[0]
        assert whole.shape == golden["prompt_logits"].shape == (24, whole.shape[-1])
        assert mx.abs(whole - golden["prompt_logits"]).max().item() < TOLERANCE
        cache = make_prompt_cache(model.model)
        row = model.model(prompt, cache=cache)[0, -1]
        tokens = []
        for expected in golden["greedy_logits"]:
            assert mx.abs(row - expected).max().item() < TOLERANCE
            tokens.append(int(mx.argmax(row).item()))
            row = model.model(mx.array([[tokens[-1]]]), cache=cache)[0, -1]
        assert tokens == golden["greedy_tokens"].tolist()
        assert model.generate(golden["prompt"].tolist(), 8) == ""
        assert model.totals().generated_tokens <= 8


def older(config: dict[str, Any]) -> dict[str, Any]:
    """The config as transformers 4 laid it out: rope settings flat, `torch_dtype`."""
    config = {
        key: older(value) if key in ("text_config", "vision_config") else value
        for key, value in config.items()
    }
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    rope = config.get("rope_parameters")
    if rope is None or any(isinstance(value, dict) for value in rope.values()):
        return config
    rope = dict(config.pop("rope_parameters"))
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            config[key] = rope.pop(key)
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" and not rope else {"type": kind, **rope}
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_older_config(family: str, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(GOLDEN / family, tmp_path / family)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(older(config)))
    golden = mx.load(str(checkpoint / "golden.safetensors"))
    store = flashmoe.repack(checkpoint, tmp_path / "store", bits=32)
    with FlashMoEModel(store, cache="min") as model:
        whole = model.model(golden["prompt"][None])[0]
        assert mx.abs(whole - golden["prompt_logits"]).max().item() < TOLERANCE
