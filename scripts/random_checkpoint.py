"""A checkpoint whose experts are much larger than everything else, written without computing."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

GROUP_SIZE = 64
VOCABULARY = 256


def save_random_checkpoint(
    folder: Path, *, layers: int = 8, experts: int = 64, width: int = 512, seed: int = 0
) -> int:
    """Write a 4-bit qwen3_moe checkpoint (bfloat16 scales, top-4) of one file per layer;
    returns its expert bytes.

    The packed weights are random bits with small scales, so that logits stay finite and the
    routing spreads over all experts.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors: dict[str, mx.array] = {}
    expert_bytes = 0

    def dense(name: str, *shape: int, spread: float | None = None) -> None:
        spread = shape[-1] ** -0.5 if spread is None else spread
        value = rng.standard_normal(shape, dtype=np.float32) * spread
        tensors[name] = mx.array(value).astype(mx.bfloat16)

    def ones(name: str, size: int) -> None:
        tensors[name] = mx.ones((size,), mx.bfloat16)

    # Large embeddings and small experts: tokens stay apart, and route apart, at every depth.
    dense("model.embed_tokens.weight", VOCABULARY, width, spread=1.0)
    dense("lm_head.weight", VOCABULARY, width)
    ones("model.norm.weight", width)
    packed = width // 8
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        ones(f"{prefix}.input_layernorm.weight", width)
        ones(f"{prefix}.post_attention_layernorm.weight", width)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            dense(f"{prefix}.self_attn.{name}.weight", width, width)
        for name in ("q_norm", "k_norm"):
            ones(f"{prefix}.self_attn.{name}.weight", 64)
        dense(f"{prefix}.mlp.gate.weight", experts, width)
        for name in ("gate_proj", "up_proj", "down_proj"):
            path = f"{prefix}.mlp.switch_mlp.{name}"
            bits = rng.integers(0, 2**32, (experts, width, packed), np.uint32)
            tensors[f"{path}.weight"] = mx.array(bits)
            scales = mx.full((experts, width, width // GROUP_SIZE), width**-0.5 / 28, mx.bfloat16)
            tensors[f"{path}.scales"] = scales
            tensors[f"{path}.biases"] = scales * -7.5
        expert_bytes += sum(a.nbytes for name, a in tensors.items() if "switch_mlp" in name)
        mx.save_safetensors(str(folder / f"model-{layer:05d}.safetensors"), tensors)
        tensors.clear()
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": width,
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "head_dim": 64,
        "num_experts": experts,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
        "quantization": {"group_size": GROUP_SIZE, "bits": 4},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return expert_bytes
