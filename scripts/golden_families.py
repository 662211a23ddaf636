"""The tiny mixture-of-experts models of the golden vectors, by name.

To add a family: write its config function beside those of its kind and list it here.
"""

import golden_attention as attention
import golden_hybrid as hybrid
import golden_latent as latent
import transformers
from golden_shared import Family

FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(latent.deepseek_v2),
    "deepseek_v3": Family(latent.deepseek_v3),
    "gemma4_text": Family(attention.gemma4_text, stds={"embed_tokens.weight": 0.2}),
    "glm4_moe": Family(attention.glm4_moe),
    "glm4_moe_lite": Family(latent.glm4_moe_lite),
    # Gates wide enough that some pass the clamp at 7.
    "gpt_oss": Family(attention.gpt_oss, stds={"experts.gate_up_proj": 0.6}),
    # Small tied embeddings: large ones would make every token predict itself.
    "granitemoe": Family(attention.granitemoe, stds={"embed_tokens.weight": 0.1}),
    "granitemoehybrid": Family(hybrid.granitemoehybrid, stds={"embed_tokens.weight": 0.1}),
    "kimi_linear": Family(hybrid.kimi_linear),
    "laguna": Family(attention.laguna),
    "lfm2_moe": Family(hybrid.lfm2_moe, stds={"embed_tokens.weight": 0.2}),
    "llama4": Family(attention.llama4, auto_class=transformers.AutoModelForImageTextToText),
    "minimax_m2": Family(attention.minimax_m2),
    "mixtral": Family(attention.mixtral),
    # Its last norm is drawn around zero, so that logits need a larger head.
    "nemotron_h": Family(hybrid.nemotron_h, stds={"lm_head.weight": 0.4}),
    "olmoe": Family(attention.olmoe),
    "qwen2_moe": Family(attention.qwen2_moe),
    "qwen3_5_moe": Family(hybrid.qwen3_5_moe),
    # Released checkpoints stack the experts, unlike what transformers writes by default.
    "qwen3_5_moe_vl": Family(
        hybrid.qwen3_5_moe_vl,
        auto_class=transformers.AutoModelForImageTextToText,
        original_format=False,
    ),
    "qwen3_moe": Family(attention.qwen3_moe),
    "qwen3_next": Family(hybrid.qwen3_next),
    "qwen3_vl_moe": Family(
        attention.qwen3_vl_moe, auto_class=transformers.AutoModelForImageTextToText
    ),
}
