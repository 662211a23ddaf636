"""Tiny models whose checkpoints capture_formats.py packs."""

import transformers
from golden_shared import COMMON, default_rope
from transformers import PreTrainedConfig

TINY = {**COMMON, "vocab_size": 64, "dtype": "bfloat16"}


def deepseek_v3() -> PreTrainedConfig:
    """Most widths are no multiples of the blocks' 32."""
    return transformers.DeepseekV3Config(
        **TINY,
        hidden_size=48,
        intermediate_size=80,
        moe_intermediate_size=40,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        num_mtp_layers=0,
        rope_parameters=default_rope(20000.0),
    )


def qwen3_moe(width: int) -> PreTrainedConfig:
    return transformers.Qwen3MoeConfig(
        **TINY,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=3,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        rope_parameters=default_rope(20000.0),
    )


def gpt_oss() -> PreTrainedConfig:
    return transformers.GptOssConfig(
        **TINY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=default_rope(20000.0),
    )
