"""Quantize the demo checkpoint for MLX: Hugging Face layout in, `flashmoe/demo` out.

The experts hold most of the bytes and take few bits; everything else that can be
quantized (embedding, attention, routers) is small, is read for every token, and takes
more. README.md in this directory has the accuracy each choice costs.

Needs mlx-lm. Knows nothing of torch, nor of how the weights were trained.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.utils import quantize_model, save_config

DEMO_DIR = Path(__file__).resolve().parents[2] / "flashmoe" / "demo"
REST_GROUP_SIZE = 64

# Copied as they are: `tokenizer.save_pretrained` would rewrite them in the words of
# whichever transformers is installed, which older ones cannot read.
COPIED_FILES = (
    "WORDNET-LICENSE",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def quantization_of(
    experts_bits: int, rest_bits: int, group_size: int
) -> Callable[[str, nn.Module], dict]:
    """The quantization each module gets, as `mlx_lm.utils.quantize_model` asks for it.

    `group_size` is that of the experts. The rest always has groups of 64. mlx-lm itself
    leaves out modules that cannot be quantized (the norms).
    """
    experts = {"group_size": group_size, "bits": experts_bits, "mode": "affine"}
    rest = {"group_size": REST_GROUP_SIZE, "bits": rest_bits, "mode": "affine"}

    def quantization(path: str, _: nn.Module) -> dict:
        return dict(experts if ".switch_mlp." in path else rest)

    return quantization


def bundle(
    source: Path, out: Path, experts_bits: int = 4, rest_bits: int = 8, group_size: int = 64
) -> int:
    """Write the quantized checkpoint to `out`, one `model.safetensors`; return its bytes.

    Weights are quantized from the dtype they are stored in, so a bfloat16 source gives
    bfloat16 scales and biases. Other files in `out`, such as the model card, stay.
    """
    model, _, config = load(str(source), return_config=True)
    model, config = quantize_model(
        model,
        config,
        group_size,
        experts_bits,
        quant_predicate=quantization_of(experts_bits, rest_bits, group_size),
    )
    # Asks flashmoe for float32 activations on every device: at this size they are as fast,
    # and 16-bit ones lose answers.
    config["torch_dtype"] = "float32"
    out.mkdir(parents=True, exist_ok=True)
    weights_path = out / "model.safetensors"
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(weights_path), weights, metadata={"format": "mlx"})
    save_config(config, out / "config.json")
    for name in COPIED_FILES:
        shutil.copyfile(source / name, out / name)
    return weights_path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="checkpoint that export.py wrote")
    parser.add_argument("--out", type=Path, default=DEMO_DIR, help="default: flashmoe/demo")
    parser.add_argument("--experts-bits", type=int, default=4, choices=(2, 3, 4, 5, 6, 8))
    parser.add_argument("--rest-bits", type=int, default=8, choices=(2, 3, 4, 5, 6, 8))
    parser.add_argument(
        "--group-size", type=int, default=64, choices=(32, 64), help="of the experts"
    )
    args = parser.parse_args()
    size_bytes = bundle(args.source, args.out, args.experts_bits, args.rest_bits, args.group_size)
    config = json.loads((args.out / "config.json").read_text())
    quantized = sum(isinstance(entry, dict) for entry in config["quantization"].values())
    print(f"{args.out}: {quantized} quantized tensors, {size_bytes / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
