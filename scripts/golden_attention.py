"""Tiny configs of the families with softmax attention over keys and values."""

import transformers
from golden_shared import COMMON, GROUPED_QUERY, VOCAB_SIZE, default_rope
from transformers import PreTrainedConfig


def gemma4_text() -> PreTrainedConfig:
    """Experts beside a dense MLP, sliding and full attention of different head widths.

    Keys serve as values in full attention, whose rotary embedding leaves some frequencies at zero.
    Scales on routers, experts and layers, softcapped logits, tied embeddings.
    """
    return transformers.Gemma4TextConfig(
        **COMMON,
        **GROUPED_QUERY,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        sliding_window=8,
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        use_double_wide_mlp=False,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=2,
        final_logit_softcapping=20.0,
        rope_parameters={
            "sliding_attention": default_rope(5000.0),
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 20000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    )


def glm4_moe() -> PreTrainedConfig:
    """A dense first layer, correction bias without groups, a shared expert.

    Its attention has q/k norm per head, half rotary and q/k/v biases.
    """
    return transformers.Glm4MoeConfig(
        **COMMON,
        **GROUPED_QUERY,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        head_dim=16,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        use_qk_norm=True,
        attention_bias=True,
        num_mtp_layers=0,
        rope_parameters=default_rope(20000.0, partial_rotary_factor=0.5),
    )


def gpt_oss() -> PreTrainedConfig:
    """Sliding and full attention with sinks, YaRN, biases on router and experts, clamped SwiGLU."""
    return transformers.GptOssConfig(
        **COMMON | {"max_position_embeddings": 4096},
        **GROUPED_QUERY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=8,
        # This theta puts both ends of YaRN's ramp on integers (0 and 2 of 8 frequencies). Elsewhere
        # mlx-lm, which always rounds them, disagrees with `truncate: false`.
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 172235.0,
            "factor": 32.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    )


def granitemoe() -> PreTrainedConfig:
    """Tied embeddings, and multipliers on embedding, attention, residual and logits."""
    return transformers.GraniteMoeConfig(
        **COMMON,
        **GROUPED_QUERY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        embedding_multiplier=1.5,
        attention_multiplier=0.125,
        residual_multiplier=0.75,
        logits_scaling=0.5,
        rope_parameters=default_rope(20000.0),
    )


def laguna() -> PreTrainedConfig:
    """Rotary settings and head counts per layer: YaRN with its own attention factor on half of
    each head in full attention, a plain one in sliding attention.

    Gated attention, softcapped sigmoid routing with correction bias, a shared expert, a dense
    first layer.
    """
    return transformers.LagunaConfig(
        **COMMON,
        **GROUPED_QUERY,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_hidden_layers=3,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        num_attention_heads_per_layer=[4, 2, 4],
        sliding_window=8,
        head_dim=16,
        gating=True,
        num_experts=8,
        num_experts_per_tok=2,
        moe_routed_scaling_factor=1.5,
        moe_router_logit_softcapping=5.0,
        rope_parameters={
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 20000.0,
                "partial_rotary_factor": 0.5,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 32,
                "beta_slow": 1,
                "attention_factor": 1.3,
            },
            "sliding_attention": default_rope(5000.0, partial_rotary_factor=1.0),
        },
    )


def llama4() -> PreTrainedConfig:
    """Chunked attention, and full attention without rotary embedding but with temperature.

    Every other layer is dense; a token has one expert, scaled at its input, and a shared one.
    """
    text = transformers.Llama4TextConfig(
        **COMMON,
        **GROUPED_QUERY,
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=64,
        num_hidden_layers=4,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=8,
        use_qk_norm=True,
        no_rope_layers=[1, 1, 1, 0],
        attn_temperature_tuning=True,
        floor_scale=8,
        attn_scale=0.2,
        rope_parameters=default_rope(20000.0),
    )
    return transformers.Llama4Config(
        text_config=text.to_dict(),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 2,
            "image_size": 4,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    )


def minimax_m2() -> PreTrainedConfig:
    """Sigmoid routing with correction bias, q/k norm over all heads, half rotary."""
    return transformers.MiniMaxM2Config(
        **COMMON,
        **GROUPED_QUERY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        rope_parameters=default_rope(20000.0, partial_rotary_factor=0.5),
    )


def mixtral() -> PreTrainedConfig:
    """Softmax over the selected experts, no other feature."""
    return transformers.MixtralConfig(
        **COMMON,
        **GROUPED_QUERY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        rope_parameters=default_rope(20000.0),
    )


def olmoe() -> PreTrainedConfig:
    """Routing weights that do not sum to one, q/k norm over all heads."""
    return transformers.OlmoeConfig(
        **COMMON,
        **GROUPED_QUERY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        rope_parameters=default_rope(20000.0),
    )


def qwen2_moe() -> PreTrainedConfig:
    """Routing weights that do not sum to one, a gated shared expert, q/k/v biases."""
    return transformers.Qwen2MoeConfig(
        **COMMON,
        **GROUPED_QUERY,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_hidden_layers=2,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        rope_parameters=default_rope(20000.0),
    )


def qwen3_moe() -> PreTrainedConfig:
    """A dense layer between MoE layers (`mlp_only_layers`), q/k norm per head."""
    return transformers.Qwen3MoeConfig(
        **COMMON,
        **GROUPED_QUERY,
        hidden_size=64,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        mlp_only_layers=[1],
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        rope_parameters=default_rope(20000.0),
    )


def qwen3_vl_moe() -> PreTrainedConfig:
    """The layers of qwen3_moe with interleaved multimodal positions, and a vision tower."""
    text = transformers.Qwen3VLMoeTextConfig(
        **COMMON,
        **GROUPED_QUERY,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
        rope_parameters=default_rope(20000.0, mrope_section=[3, 3, 2], mrope_interleaved=True),
    )
    return transformers.Qwen3VLMoeConfig(
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
            "deepstack_visual_indexes": [],
        },
        image_token_id=VOCAB_SIZE - 1,
        video_token_id=VOCAB_SIZE - 2,
        vision_start_token_id=VOCAB_SIZE - 3,
        vision_end_token_id=VOCAB_SIZE - 4,
    )
