"""Which part of a model each module is, over every family."""

import pytest

from flashmoe.checkpoint.architecture import build_model, expert_modules, projections_of
from flashmoe.repacking.model_parts import Parts, layer_of
from flashmoe.repacking.recipe import PARTS
from tests.support.families import FAMILIES


def parts_of(config):
    """The part of each module that can be quantized, by path."""
    model, _ = build_model(config)
    parts = Parts(model)
    return model, {
        path: parts.of(path)
        for path, module in model.named_modules()
        if hasattr(module, "to_quantized")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_parts(family):
    model, parts = parts_of(FAMILIES[family])
    assert set(parts.values()) <= set(PARTS)
    projections = {
        f"{path}.{name}" for path, m in expert_modules(model).items() for name in projections_of(m)
    }
    assert {p for p, part in parts.items() if part in ("gate", "up", "down")} == projections
    assert "attention" in parts.values()
    assert sum(part == "head" for part in parts.values()) <= 1
    assert "embeddings" in parts.values()
    for path, part in parts.items():
        if part == "head":
            assert layer_of(path) is None
        # The names that make a feed-forward block, shared experts and routers included.
        if any(word in path for word in (".mlp", "feed_forward", "moe", "expert", "router")):
            assert part not in ("attention", "embeddings", "head"), path


@pytest.mark.parametrize(
    ("family", "path", "part"),
    [
        ("qwen3_moe", "model.layers.1.mlp.switch_mlp.gate_proj", "gate"),
        ("qwen3_moe", "model.layers.0.mlp.gate_proj", "resident"),
        ("qwen3_moe", "model.layers.1.mlp.gate", "resident"),
        ("qwen3_moe", "lm_head", "head"),
        ("qwen3_next", "model.layers.1.linear_attn.out_proj", "attention"),
        ("deepseek_v3", "model.layers.1.self_attn.kv_b_proj", "attention"),
        ("deepseek_v3", "model.layers.1.mlp.shared_experts.up_proj", "resident"),
        ("lfm2_moe", "model.layers.0.conv.in_proj", "attention"),
        ("jamba", "model.layers.0.mamba.in_proj", "attention"),
        ("nemotron_h", "backbone.embeddings", "embeddings"),
    ],
)
def test_parts_by_name(family, path, part):
    model, _ = build_model(FAMILIES[family])
    assert Parts(model).of(path) == part


def test_layers_are_counted_where_they_are():
    assert layer_of("model.layers.12.mlp.experts.3") == 12
    assert layer_of("lm_head") is None
