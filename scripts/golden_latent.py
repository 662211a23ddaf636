"""Tiny configs of the families with multi-head latent attention (MLA) only."""

import transformers
from golden_shared import COMMON, default_rope
from transformers import PreTrainedConfig


def deepseek_v2() -> PreTrainedConfig:
    """MLA, YaRN with mscale, softmax scores that do not sum to one, groups by their best expert."""
    return transformers.DeepseekV2Config(
        **COMMON,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        norm_topk_prob=False,
        routed_scaling_factor=2.5,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 20000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.2,
            "mscale_all_dim": 0.8,
        },
    )


def deepseek_v3() -> PreTrainedConfig:
    """MLA, YaRN with mscale, a dense first layer, group routing, correction bias, shared expert."""
    return transformers.DeepseekV3Config(
        **COMMON,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_mtp_layers=0,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 20000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    )


def glm4_moe_lite() -> PreTrainedConfig:
    """MLA without YaRN, a dense first layer, correction bias without groups, a shared expert."""
    return transformers.Glm4MoeLiteConfig(
        **COMMON,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=24,
        # The default of MLA's inner norms in transformers, where mlx-lm uses this field.
        rms_norm_eps=1e-6,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        rope_parameters=default_rope(20000.0),
    )
