"""The tiny mixture-of-experts models of the golden vectors, one config function per family.

Each config keeps what sets its family apart (kinds of layers, routing, biases, rotary embedding)
at dimensions that make a checkpoint of about half a megabyte. Values that transformers or mlx-lm
would also assume by default are avoided where possible, so that a field that is not read shows.
Dimensions that a quantized weight is grouped along are multiples of 32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import transformers
from transformers import PreTrainedConfig

VOCAB_SIZE = 128

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    # No token is special: prompt and greedy tokens are plain ids, there is no tokenizer.
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Heads of a family whose hidden size is 64, for attention without other features.
GROUPED_QUERY = {"num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Family:
    """One architecture: its tiny config, and `stds` of weights by name suffix where the default
    scale would leave a feature untouched.

    `original_format` is passed to `save_pretrained`: true writes one tensor per expert where
    transformers has such a mapping, false writes its own stacked experts.
    """

    config: Callable[[], PreTrainedConfig]
    auto_class: type = transformers.AutoModelForCausalLM
    stds: Mapping[str, float] = field(default_factory=dict)
    original_format: bool = True


def default_rope(theta: float, **extra: object) -> dict[str, object]:
    """Return transformers 5's `rope_parameters` for unscaled rotary embeddings."""
    return {"rope_type": "default", "rope_theta": theta, **extra}


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


# To add a family: write its config function above and list it here.
FAMILIES: dict[str, Family] = {
    "deepseek_v3": Family(deepseek_v3),
    "glm4_moe": Family(glm4_moe),
    "glm4_moe_lite": Family(glm4_moe_lite),
    # Gates wide enough that some pass the clamp at 7.
    "gpt_oss": Family(gpt_oss, stds={"experts.gate_up_proj": 0.6}),
    # Small tied embeddings: large ones would make every token predict itself.
    "granitemoe": Family(granitemoe, stds={"embed_tokens.weight": 0.1}),
    "lfm2_moe": Family(lfm2_moe, stds={"embed_tokens.weight": 0.2}),
    "minimax_m2": Family(minimax_m2),
    "mixtral": Family(mixtral),
    "olmoe": Family(olmoe),
    "qwen2_moe": Family(qwen2_moe),
    "qwen3_5_moe": Family(qwen3_5_moe),
    # Released checkpoints stack the experts, unlike what transformers writes by default.
    "qwen3_5_moe_vl": Family(
        qwen3_5_moe_vl,
        auto_class=transformers.AutoModelForImageTextToText,
        original_format=False,
    ),
    "qwen3_moe": Family(qwen3_moe),
    "qwen3_next": Family(qwen3_next),
}
