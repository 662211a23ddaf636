"""Tiny configs of the families that mix attention with recurrent or convolution layers."""

import transformers
from golden_shared import COMMON, GROUPED_QUERY, VOCAB_SIZE, default_rope
from transformers import PreTrainedConfig


def granitemoehybrid() -> PreTrainedConfig:
    """Mamba 2 and attention without rotary embedding, a shared MLP beside the experts.

    Tied embeddings, and multipliers on embedding, attention, residual and logits.
    """
    return transformers.GraniteMoeHybridConfig(
        **COMMON,
        **GROUPED_QUERY,
        hidden_size=32,
        intermediate_size=32,
        shared_intermediate_size=32,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_expand=2,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_chunk_size=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        embedding_multiplier=1.5,
        attention_multiplier=0.125,
        residual_multiplier=0.75,
        logits_scaling=0.5,
        # Left at null, which is how transformers says that there is none.
        position_embedding_type=None,
        rope_parameters=default_rope(20000.0),
    )


def kimi_linear() -> PreTrainedConfig:
    """Kimi delta attention and MLA without rotary embedding, a dense first layer.

    Correction bias without groups, a shared expert.
    """
    return transformers.KimiLinearConfig(
        **COMMON,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse"],
        linear_head_dim=16,
        linear_num_heads=2,
        linear_conv_kernel_dim=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        # The default of MLA's inner norm in transformers, where mlx-lm uses this field.
        rms_norm_eps=1e-6,
        num_experts=8,
        num_shared_experts=1,
        num_experts_per_token=2,
        num_expert_group=1,
        topk_group=1,
        moe_renormalize=True,
        routed_scaling_factor=1.5,
    )


def lfm2_moe() -> PreTrainedConfig:
    """Short convolutions and full attention, a dense first layer, expert bias, tied embeddings."""
    return transformers.Lfm2MoeConfig(
        **COMMON,
        **GROUPED_QUERY,
        hidden_size=64,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        layer_types=["conv", "conv", "full_attention"],
        num_dense_layers=1,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        use_expert_bias=True,
        routed_scaling_factor=1.0,
        rope_parameters=default_rope(20000.0),
    )


def nemotron_h() -> PreTrainedConfig:
    """Mamba 2, attention, MLP and MoE as layers of their own, without rotary embedding.

    Experts without a gate (squared ReLU) work in a latent space; correction bias, a shared expert.
    """
    return transformers.NemotronHConfig(
        **COMMON,
        **GROUPED_QUERY,
        hidden_size=64,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "moe"],
        head_dim=16,
        intermediate_size=64,
        ssm_state_size=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        conv_kernel=4,
        expand=2,
        chunk_size=16,
        n_routed_experts=8,
        n_shared_experts=1,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        moe_latent_size=32,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )


def qwen3_5_moe_text() -> transformers.Qwen3_5MoeTextConfig:
    return transformers.Qwen3_5MoeTextConfig(
        **COMMON,
        **GROUPED_QUERY,
        hidden_size=32,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_hidden_layers=3,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=4,
        num_experts=8,
        num_experts_per_tok=2,
        rope_parameters=default_rope(
            20000.0, partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True
        ),
    )


def qwen3_5_moe() -> PreTrainedConfig:
    """Gated delta and gated full attention 2:1, a gated shared expert, saved as a text model."""
    return qwen3_5_moe_text()


def qwen3_5_moe_vl() -> PreTrainedConfig:
    """The layers of qwen3_5_moe, saved with a vision tower as the released checkpoints are."""
    text = qwen3_5_moe_text()
    return transformers.Qwen3_5MoeConfig(
        text_config=text.to_dict(),
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 2,
            "temporal_patch_size": 1,
            "spatial_merge_size": 1,
            "num_position_embeddings": 4,
            "out_hidden_size": text.hidden_size,
        },
        image_token_id=VOCAB_SIZE - 1,
        video_token_id=VOCAB_SIZE - 2,
        vision_start_token_id=VOCAB_SIZE - 3,
        vision_end_token_id=VOCAB_SIZE - 4,
    )


def qwen3_next() -> PreTrainedConfig:
    """Gated delta and gated full attention in turn, a gated shared expert."""
    return transformers.Qwen3NextConfig(
        **COMMON,
        **GROUPED_QUERY,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=4,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        rope_parameters=default_rope(20000.0, partial_rotary_factor=0.5),
    )
