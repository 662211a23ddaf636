"""Exactness (c): logits and greedy tokens of Hugging Face transformers, at the minimum bank.

The checkpoints under golden/ are as transformers 5 writes them; golden/README.md says how they
were captured.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

import flashmoe
from flashmoe import FlashMoEModel

GOLDEN = Path(__file__).parent / "golden"
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
        assert model.stats().tokens <= 8
