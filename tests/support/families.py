"""Tiny checkpoints of the MoE families of mlx-lm, built from mlx-lm's own model classes.

A family is one mlx-lm model file that routes through `SwitchGLU` or `SwitchMLP`. Each config has
hidden size 64 (128 where the experts work in a latent space of 64), 8 experts of width 64, and the
few layers that show every layer kind of the family: dense and MoE, full and sliding or chunked or
sparse attention, attention and SSM. Widths are multiples of 64, so that every expert projection
quantizes at group size 64. The weights are random: logits are finite, and mean nothing.
"""

import contextlib
import copy
import io
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.utils import _get_classes, load_model, quantize_model, save_config, save_model


def build_model(config: dict[str, Any], seed: int, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """Builds the mlx-lm model of `config` with random parameters, evaluated, in eval mode.

    Matrices `[..., out, in]` are normal with variance 1 / in, so that signal and router logits stay
    near unit size; embeddings have standard deviation 0.5, enough for tokens to route apart, little
    enough for the experts to show in the logits; vectors get small noise on top of mlx-lm's initial
    value (norm weights stay near one, selection biases become nonzero without pinning the routing).
    Parameters have `dtype`, except those that the family's `cast_predicate` keeps as they were.
    Reseeds MLX's global generator.
    """
    mx.random.seed(seed)
    model_class, args_class = _get_classes(config)
    # Some ModelArgs rewrite the nested dicts that they are given.
    model = model_class(args_class.from_dict(copy.deepcopy(config)))
    may_cast = getattr(model, "cast_predicate", lambda path: True)
    embeddings = {
        f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Embedding)
    }

    def draw(path: str, initial: mx.array) -> mx.array:
        if initial.ndim < 2:
            spread = 0.02 if path.endswith("bias") else 0.1
            value = initial + spread * mx.random.normal(initial.shape)
        elif path in embeddings:
            value = 0.5 * mx.random.normal(initial.shape)
        else:
            # A depthwise convolution is [channels, kernel, 1]: it sums over the kernel.
            fan_in = initial.shape[-1] if initial.shape[-1] > 1 else math.prod(initial.shape[1:])
            value = mx.random.normal(initial.shape) / math.sqrt(fan_in)
        return value.astype(dtype if may_cast(path) else initial.dtype)

    model.update(tree_map_with_path(draw, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def save_checkpoint(
    path: str | Path,
    family: str,
    *,
    bits: int | None = 4,
    group_size: int | None = 64,
    mode: str = "affine",
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
) -> None:
    """Writes config.json, model.safetensors and its index into the directory `path`.

    The tensors have mlx-lm's sanitized names. `bits=None` writes them unquantized in `dtype`: on a
    CPU such experts run in float32 only, MLX's GatherMM has no other dtype there. Otherwise mlx-lm
    quantizes them as `mlx_lm.convert` does, with the family's `quant_predicate` (8-bit routers
    among 4-bit experts, for one). `group_size=None` takes the mode's own, which the modes other
    than affine insist on: 32 for mxfp4 and mxfp8, 16 for nvfp4.

    Raises:
        KeyError: `family` is not in `FAMILIES`.
    """
    config = copy.deepcopy(FAMILIES[family])
    model = build_model(config, seed, dtype)
    if bits is not None:
        # quantize_model prints the bits per weight.
        with contextlib.redirect_stdout(io.StringIO()):
            model, config = quantize_model(model, config, group_size, bits, mode=mode)
    save_model(path, model)
    save_config(config, Path(path) / "config.json")


def load_resident(path: str | Path) -> nn.Module:
    """Loads the checkpoint at `path` with stock mlx-lm, strictly, all weights in memory."""
    model, _ = load_model(Path(path))
    return model


# fmt: off
_BASE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 512,
    "tie_word_embeddings": False}
_GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_MLA = {
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 64, "kv_lora_rank": 64,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 16, "v_head_dim": 64}
_SLIDING = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_YARN = {
    "type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
    "rope_theta": 10000.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}

# The same facts under the three sets of names that the families share.
_QWEN = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "norm_topk_prob": True}
_MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64}
_DEEPSEEK = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 2,
    "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
_BAILING = {
    "num_shared_experts": 1, "moe_shared_expert_intermediate_size": 64, "first_k_dense_replace": 1,
    "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5, "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True, "use_qk_norm": True}

_GATED_DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "full_attention_interval": 2}
_KDA = {
    "num_heads": 2, "head_dim": 32, "short_conv_kernel_size": 4, "kda_layers": [1, 3],
    "full_attn_layers": [2]}
_INDEXER = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 8}
_KIMI = {
    "num_experts": 8, "num_experts_per_token": 2, "moe_intermediate_size": 64,
    "num_shared_experts": 1, "moe_router_activation_func": "sigmoid", "moe_renormalize": True,
    "routed_scaling_factor": 1.5, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "num_expert_group": 2, "topk_group": 1, "linear_attn_config": _KDA}
_LONGCAT = {
    "vocab_size": 128, "hidden_size": 64, "ffn_hidden_size": 128, "expert_ffn_hidden_size": 64,
    "num_layers": 2, "n_routed_experts": 8, "zero_expert_num": 4, "zero_expert_type": "identity",
    "moe_topk": 3, "routed_scaling_factor": 1.5, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 512, "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
    "attention_bias": False, "attention_method": "MLA"}


def _text(model_type: str, *parts: dict[str, Any], **own: Any) -> dict[str, Any]:
    """Merges shared parts and the family's own fields into one config, free of shared state."""
    config: dict[str, Any] = {"model_type": model_type}
    for part in (*parts, own):
        config |= copy.deepcopy(part)
    return config


def _wrapped(model_type: str, text: dict[str, Any], **own: Any) -> dict[str, Any]:
    """The config of a multimodal family, which nests its language model under text_config."""
    return {"model_type": model_type, "text_config": copy.deepcopy(text), **own}


_DEEPSEEK_V3 = _text("deepseek_v3", _BASE, _MLA, _DEEPSEEK, rope_scaling=_YARN)
_QWEN3_MOE = _text("qwen3_moe", _BASE, _GQA, _QWEN, decoder_sparse_step=1, mlp_only_layers=[0])
_GEMMA4_TEXT = _text(
    "gemma4_text", _BASE, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=4,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    num_kv_shared_layers=0, hidden_size_per_layer_input=0, use_double_wide_mlp=False,
    enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=64,
    tie_word_embeddings=True)
_MISTRAL4 = _text(
    "mistral4", _BASE, _MLA, _DEEPSEEK, rope_interleave=True,
    rope_parameters=_YARN | {"llama_4_scaling_beta": 0.1})

FAMILIES: dict[str, dict[str, Any]] = {
    "Klear": _text(
        "Klear", _BASE, _GQA, _QWEN, attention_bias=False, mlp_only_layers=[0],
        decoder_sparse_step=1, n_shared_experts=1),
    "afmoe": _text(
        "afmoe", _BASE, _GQA, _QWEN, _SLIDING, num_shared_experts=1, num_dense_layers=1,
        route_norm=True, route_scale=1.5, score_func="sigmoid", n_group=2, topk_group=1),
    "bailing_hybrid": _text(
        "bailing_hybrid", _BASE, _MLA, _QWEN, _BAILING, num_hidden_layers=4, layer_group_size=2,
        group_norm_size=2, head_dim=32, partial_rotary_factor=0.5),
    "bailing_moe": _text("bailing_moe", _BASE, _GQA, _QWEN, _BAILING, norm_head=False),
    "bailing_moe_linear": _text(
        "bailing_moe_linear", _BASE, _GQA, _QWEN, _BAILING, num_hidden_layers=4,
        layer_group_size=2, group_norm_size=2, partial_rotary_factor=0.5),
    # Published with the model_type of bailing_hybrid: only the architecture tells them apart.
    "bailing_moe_v3": _text(
        "bailing_hybrid", _BASE, _MLA, _QWEN, _BAILING, num_hidden_layers=4, layer_group_size=2,
        head_dim=32, architectures=["BailingMoeV3ForCausalLM"]),
    "deepseek": _text("deepseek", _BASE, _GQA, _DEEPSEEK),
    "deepseek_v2": _text(
        "deepseek_v2", _BASE, _MLA, _DEEPSEEK, rope_scaling=_YARN,
        topk_method="group_limited_greedy"),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _text(
        "deepseek_v32", _BASE, _MLA, _DEEPSEEK, _INDEXER, rope_scaling=_YARN),
    "deepseek_v41": _text(
        "deepseek_v41", _BASE, num_hidden_layers=4, num_attention_heads=4, head_dim=32,
        q_lora_rank=64, qk_rope_head_dim=16, o_groups=2, o_lora_rank=64, moe_intermediate_size=64,
        n_routed_experts=8, num_experts_per_tok=3, scoring_func="sqrtsoftplus", sliding_window=4,
        compress_ratios=[0, 2, 2, 2], kv_source_layer_ids=[1], index_source_layer_ids=[1, 3],
        candidate_source_layer_id=1, candidate_topk_blocks=2, candidate_block_size=2,
        index_n_heads=2, index_head_dim=32, index_topk=2, hc_mult=2),
    "dots1": _text("dots1", _BASE, _GQA, _DEEPSEEK),
    "ernie4_5_moe": _text(
        "ernie4_5_moe", _BASE, _GQA, use_bias=True, moe_num_experts=8, moe_k=2,
        moe_intermediate_size=64, moe_layer_start_index=1, moe_layer_interval=1,
        moe_num_shared_experts=1, moe_gate_act="softmax"),
    "exaone_moe": _text(
        "exaone_moe", _BASE, _GQA, _QWEN, _SLIDING, num_shared_experts=1, n_group=2, topk_group=1,
        is_moe_layer=[False, True, True]),
    "gemma4": _wrapped("gemma4", _GEMMA4_TEXT, vocab_size=128),
    "gemma4_text": _GEMMA4_TEXT,
    "glm4_moe": _text(
        "glm4_moe", _BASE, _GQA, _DEEPSEEK, rope_scaling=None, use_qk_norm=True,
        attention_bias=True, partial_rotary_factor=0.5),
    "glm4_moe_lite": _text("glm4_moe_lite", _BASE, _MLA, _DEEPSEEK),
    "glm_moe_dsa": _text(
        "glm_moe_dsa", _BASE, _MLA, _DEEPSEEK, _INDEXER, attention_bias=False,
        rope_parameters=_ROPE),
    "gpt_oss": _text("gpt_oss", _BASE, _GQA, _MIXTRAL, _SLIDING, rope_scaling=_YARN),
    "granitemoe": _text(
        "granitemoe", _BASE, _GQA, _MIXTRAL, logits_scaling=2.0, attention_multiplier=0.25,
        embedding_multiplier=2.0, residual_multiplier=0.5, attention_bias=False,
        tie_word_embeddings=True),
    "granitemoehybrid": _text(
        "granitemoehybrid", _BASE, _GQA, _MIXTRAL, logits_scaling=2.0, attention_multiplier=0.25,
        embedding_multiplier=2.0, residual_multiplier=0.5, attention_bias=False,
        layer_types=["mamba", "attention", "mamba"], shared_intermediate_size=64, mamba_n_heads=4,
        mamba_d_head=32, mamba_proj_bias=False, mamba_d_state=16, mamba_d_conv=4, mamba_n_groups=1,
        mamba_conv_bias=True, position_embedding_type="nope", tie_word_embeddings=True),
    # Expert width and top-k are lists here: they differ from layer to layer.
    "hunyuan": _text(
        "hunyuan", _BASE, _GQA, num_hidden_layers=4, intermediate_size=64, attention_bias=False,
        num_experts=8, moe_topk=[2, 3, 2, 2], moe_intermediate_size=[64, 128, 64, 64],
        num_shared_expert=[1, 1, 1, 1], use_mixed_mlp_moe=True, use_qk_norm=True, use_cla=True,
        cla_share_factor=2, rope_scaling={"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
        tie_word_embeddings=True),
    "jamba": _text(
        "jamba", _BASE, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4,
        intermediate_size=64, attn_layer_offset=1, attn_layer_period=4, expert_layer_offset=1,
        expert_layer_period=2, mamba_d_conv=4, mamba_d_state=16, mamba_expand=2, num_experts=8,
        num_experts_per_tok=2, tie_word_embeddings=True),
    "kimi_k25": _wrapped("kimi_k25", _DEEPSEEK_V3),
    "kimi_k3": _wrapped("kimi_k3", _text(
        "kimi_linear", _BASE, _MLA, _KIMI, hidden_size=128, routed_expert_hidden_size=64,
        latent_moe_use_norm=True, hidden_act="situ", activation_situ_beta=4.0,
        activation_situ_linear_beta=4.0, attn_res_block_size=2, mla_use_nope=True,
        mla_use_output_gate=True)),
    "kimi_linear": _text("kimi_linear", _BASE, _MLA, _KIMI, head_dim=64, model_max_length=512),
    "kimi_vl": _wrapped("kimi_vl", _DEEPSEEK_V3),
    "laguna": _text(
        "laguna", _BASE, _GQA, _QWEN, _SLIDING, gating=True, shared_expert_intermediate_size=64,
        num_attention_heads_per_layer=[4, 4, 2], mlp_layer_types=["dense", "sparse", "sparse"],
        moe_routed_scaling_factor=1.5, moe_router_logit_softcapping=5.0,
        rope_parameters={
            "full_attention": _YARN | {"partial_rotary_factor": 0.5},
            "sliding_attention": _ROPE}),
    "lfm2_moe": _text(
        "lfm2_moe", _BASE, _GQA, _QWEN, norm_eps=1e-6, use_expert_bias=True, num_dense_layers=1,
        conv_bias=False, conv_L_cache=3, layer_types=["conv", "full_attention", "conv"]),
    # Top-1 only, and at least four layers: the forward reads cache[3] whatever the depth.
    "llama4": _wrapped("llama4", _text(
        "llama4_text", _BASE, _GQA, _MIXTRAL, num_hidden_layers=4, num_experts_per_tok=1,
        interleave_moe_layer_step=2, intermediate_size_mlp=128, attention_bias=False,
        attention_chunk_size=8, rope_scaling=None, use_qk_norm=True)),
    "longcat_flash": _text("longcat_flash", _MLA, _LONGCAT),
    "longcat_flash_ngram": _text(
        "longcat_flash_ngram", _MLA, _LONGCAT, ngram_vocab_size_ratio=2, emb_neighbor_num=3,
        emb_split_num=1),
    "mellum": _text(
        "mellum", _BASE, _GQA, _QWEN, _SLIDING, rope_parameters={
            "full_attention": _YARN, "sliding_attention": _ROPE}),
    "mimo_v2_flash": _text(
        "mimo_v2_flash", _BASE, _GQA, _DEEPSEEK, hybrid_layer_pattern=[0, 1, 0],
        moe_layer_freq=[0, 1, 1], add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False, sliding_window_size=4, n_shared_experts=None,
        layernorm_epsilon=1e-6, swa_rope_theta=10000.0, swa_num_attention_heads=4,
        swa_num_key_value_heads=4, v_head_dim=16, swa_head_dim=16, swa_v_head_dim=16,
        partial_rotary_factor=0.5),
    "minimax": _text(
        "minimax", _BASE, _GQA, _MIXTRAL, shared_intermediate_size=0, rotary_dim=8,
        use_qk_norm=True),
    "minimax_m3_vl": _wrapped("minimax_m3_vl", _text(
        "minimax_m3", _BASE, _GQA, _MIXTRAL, dense_intermediate_size=128,
        shared_intermediate_size=64, moe_layer_freq=[0, 1, 1], partial_rotary_factor=0.5,
        sparse_attention_config={
            "sparse_num_index_heads": 2, "sparse_index_dim": 16, "sparse_block_size": 4,
            "sparse_topk_blocks": 2, "sparse_local_block": 1, "sparse_attention_freq": [0, 1, 1]})),
    "mistral3": _wrapped("mistral3", _MISTRAL4),
    "mistral4": _MISTRAL4,
    "mixtral": _text("mixtral", _BASE, _GQA, _MIXTRAL),
    "nemotron_h": _text(
        "nemotron_h", _BASE, _GQA, _DEEPSEEK, hidden_size=128, moe_latent_size=64,
        hybrid_override_pattern="ME*-E", moe_shared_expert_intermediate_size=64,
        attention_bias=False, mlp_bias=False, use_bias=False, mamba_num_heads=4, mamba_head_dim=32,
        mamba_proj_bias=False, ssm_state_size=16, conv_kernel=4, n_groups=2, use_conv_bias=True,
        layer_norm_epsilon=1e-6),
    "olmoe": _text(
        "olmoe", _BASE, _GQA, num_experts=8, num_experts_per_tok=2, intermediate_size=64,
        norm_topk_prob=False),
    "phimoe": _text(
        "phimoe", _BASE, _GQA, _MIXTRAL, original_max_position_embeddings=128, rope_scaling={
            "type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
            "short_mscale": 1.2, "long_mscale": 1.2}),
    # The expert width is four times model_dim, by construction.
    "phixtral": _text(
        "phixtral", num_vocab=128, model_dim=64, num_heads=4, num_layers=3, rotary_dim=8,
        num_experts_per_tok=2, num_local_experts=8),
    "qwen2_moe": _text("qwen2_moe", _BASE, _GQA, _QWEN, shared_expert_intermediate_size=128),
    "qwen3_5_moe": _wrapped("qwen3_5_moe", _text(
        "qwen3_5_moe_text", _BASE, _GQA, _QWEN, _GATED_DELTA, shared_expert_intermediate_size=64,
        rope_parameters=_ROPE | {"partial_rotary_factor": 0.5})),
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_next": _text(
        "qwen3_next", _BASE, _GQA, _QWEN, _GATED_DELTA, shared_expert_intermediate_size=64,
        decoder_sparse_step=1, mlp_only_layers=[0], partial_rotary_factor=0.5),
    "qwen3_vl_moe": _wrapped("qwen3_vl_moe", _QWEN3_MOE),
    "solar_open": _text("solar_open", _BASE, _GQA, _DEEPSEEK, partial_rotary_factor=0.5),
    "step3p5": _text(
        "step3p5", _BASE, _SLIDING, num_attention_heads=4, num_attention_groups=2, head_dim=16,
        attention_other_setting={"num_attention_heads": 2, "num_attention_groups": 1},
        moe_num_experts=8, moe_top_k=2, moe_intermediate_size=64, share_expert_dim=64,
        moe_layers_enum="1,2", swiglu_limits=[0.0, 0.0, 1.0], swiglu_limits_shared=[0.0, 0.0, 2.0]),
}
# fmt: on

LEFT_OUT: dict[str, str] = {
    "dbrx": "keeps each expert as its own module and loops over them: no SwitchGLU to replace",
    "muse_spark": "its forward calls Metal kernels without a twin in plain ops: no CPU forward",
}
