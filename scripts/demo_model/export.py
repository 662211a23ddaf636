"""Write a training run as a Hugging Face checkpoint in bfloat16.

    python scripts/demo_model/export.py runs/demo runs/demo-hf

transformers and mlx-lm load the result as `qwen3_moe`; bundle.py quantizes it.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from model import ModelConfig
from safetensors.torch import save_file
from torch import Tensor
from train import CHECKPOINT_NAME, TOKENIZER_NAME
from vocabulary import CHAT_TEMPLATE, END_TOKEN, PAD_TOKEN, SPECIAL_TOKENS

LICENCE_PATH = Path(__file__).resolve().parents[2] / "flashmoe" / "demo" / "WORDNET-LICENSE"
MAX_POSITIONS = 2048
PAD_ID = SPECIAL_TOKENS.index(PAD_TOKEN)
END_ID = SPECIAL_TOKENS.index(END_TOKEN)


def hugging_face_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The training run's tensors under Hugging Face's names, bfloat16, experts apart.

    gate_up [experts, hidden, 2 * intermediate] and down [experts, intermediate, hidden]
    are stored input-first; Hugging Face's linear layers are output-first.
    """
    exported = {}
    for name, weight in weights.items():
        prefix, _, leaf = name.rpartition(".")
        if leaf == "gate_up":
            for expert, gate_up in enumerate(weight):
                gate, up = gate_up.t().chunk(2)
                exported[f"model.{prefix}.experts.{expert}.gate_proj.weight"] = gate
                exported[f"model.{prefix}.experts.{expert}.up_proj.weight"] = up
        elif leaf == "down":
            for expert, down in enumerate(weight):
                exported[f"model.{prefix}.experts.{expert}.down_proj.weight"] = down.t()
        else:
            exported[f"model.{name}"] = weight
    return {name: weight.to(torch.bfloat16).contiguous() for name, weight in exported.items()}


def hugging_face_config(config: ModelConfig) -> dict:
    """config.json's content."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": config.hidden_size,
        "intermediate_size": 768,  # of dense layers: required by the format, there are none
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": True,
        "max_position_embeddings": MAX_POSITIONS,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
    }


def tokenizer_config() -> dict:
    """tokenizer_config.json's content."""
    flags = {
        "special": True,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TOKEN,
        "pad_token": PAD_TOKEN,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(token_id): {"content": token, **flags}
            for token_id, token in enumerate(SPECIAL_TOKENS)
        },
    }


def export(run: Path, out: Path) -> int:
    """Write the checkpoint in directory `run` to directory `out`; return its tensor count."""
    checkpoint = torch.load(run / CHECKPOINT_NAME, map_location="cpu")
    weights = hugging_face_weights(checkpoint["model"])
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    json_files = {
        "config.json": hugging_face_config(ModelConfig(**checkpoint["config"])),
        "generation_config.json": {
            "eos_token_id": END_ID,
            "pad_token_id": PAD_ID,
            "do_sample": False,
        },
        "tokenizer_config.json": tokenizer_config(),
    }
    for name, content in json_files.items():
        (out / name).write_text(json.dumps(content, indent=1))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    shutil.copyfile(run / TOKENIZER_NAME, out / "tokenizer.json")
    # The licence must travel with everything made from WordNet.
    shutil.copyfile(LICENCE_PATH, out / "WORDNET-LICENSE")
    return len(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="train.py's --out directory")
    parser.add_argument("out", type=Path, help="directory for the checkpoint")
    args = parser.parse_args()
    print(f"{args.out}: {export(args.run, args.out)} tensors")


if __name__ == "__main__":
    main()
