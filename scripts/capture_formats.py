"""Capture checkpoints as others pack them: tiny models, packed and unpacked by others' code.

For each case this writes the checkpoint as its publishers lay it out, the SHA-256 of each weight
as transformers or compressed-tensors unpacks it, and the logits of the unpacked model in float32.

This script needs torch, transformers, accelerate, compressed-tensors and nvidia-modelopt. It knows
nothing of mlx or of flashmoe, which is what makes its files independent of the code they test.

    python scripts/capture_formats.py [CASE ...] [--out tests/formats]
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from capture_golden import randomize
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from format_models import deepseek_v3, gpt_oss, qwen3_moe
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

PROMPT_TOKENS = 16

Tensors = dict[str, torch.Tensor]


def floats_of(config: PreTrainedConfig, folder: Path) -> Tensors:
    """A random bfloat16 model's tensors, by the names that transformers saves."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, 0, {})
    model.to(torch.bfloat16).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def logits_of(folder: Path, prompt: torch.Tensor) -> torch.Tensor:
    """Of the checkpoint in `folder`, whose weights transformers unpacks to bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
    )
    return model.float().eval()(input_ids=prompt[None], use_cache=False).logits[0]


def quantizer(block: tuple[int, int]) -> SimpleNamespace:
    """As much of transformers' quantizer as its fp8 operations ask for."""
    settings = SimpleNamespace(weight_block_size=block, scale_fmt="float")
    return SimpleNamespace(quantization_config=settings)


def fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and inverse scales, the last blocks filled up with zeros for transformers' code."""
    rows, columns = weight.shape
    whole = pad(weight, (0, -columns % block[1], 0, -rows % block[0]))
    made = Fp8Quantize(quantizer(block)).convert({"x.weight": whole})
    return made["x.weight"][:rows, :columns].contiguous(), made["x.weight_scale_inv"]


def unpacked_fp8(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """bfloat16, of blocks filled up as `fp8` has them."""
    rows, columns = codes.shape
    filled = pad(codes.view(torch.uint8), (0, -columns % block[1], 0, -rows % block[0]))
    whole = Fp8Dequantize(quantizer(block))._dequantize_one(
        filled.view(codes.dtype), scales, output_dtype=torch.bfloat16
    )
    return whole[:rows, :columns].contiguous()


def pack_fp8(
    config: PreTrainedConfig, folder: Path, block: tuple[int, int], scale_dtype: torch.dtype
) -> Tensors:
    """Writes an fp8 checkpoint, all projections but the head packed; its weights unpacked."""
    floats = floats_of(config, folder)
    packed: Tensors = {}
    unpacked: Tensors = {}
    for name, tensor in floats.items():
        if not name.endswith("proj.weight") and not name.endswith("proj_with_mqa.weight"):
            packed[name] = unpacked[name] = tensor
            continue
        codes, scales = fp8(tensor, block)
        packed[name], packed[f"{name}_scale_inv"] = codes, scales.to(scale_dtype)
        unpacked[name] = unpacked_fp8(codes, scales.to(scale_dtype), block)
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    state(
        folder,
        activation_scheme="dynamic",
        quant_method="fp8",
        weight_block_size=list(block),
        modules_to_not_convert=["lm_head", "model.layers.0.mlp.gate"],
    )
    return unpacked


def state(folder: Path, **quantization: object) -> None:
    """Puts a quantization_config into the checkpoint's config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps(config, indent=2) + "\n")


def logits_of_floats(unpacked: Tensors, folder: Path, prompt: torch.Tensor) -> torch.Tensor:
    """As `logits_of`, of weights that are unpacked already."""
    with tempfile.TemporaryDirectory() as scratch:
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (Path(scratch) / "config.json").write_text(json.dumps(config))
        save_file(unpacked, Path(scratch) / "model.safetensors", {"format": "pt"})
        return logits_of(Path(scratch), prompt)


def fp8_deepseek_v3(folder: Path, prompt: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    unpacked = pack_fp8(deepseek_v3(), folder, (32, 32), torch.float32)
    return unpacked, logits_of_floats(unpacked, folder, prompt)


def fp8_qwen3_moe(folder: Path, prompt: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Blocks of 128, which the experts' width of 160 is no multiple of."""
    unpacked = pack_fp8(qwen3_moe(160), folder, (128, 128), torch.bfloat16)
    return unpacked, logits_of_floats(unpacked, folder, prompt)


def scheme_of(name: str) -> QuantizationScheme | None:
    """How compressed-tensors is to pack a weight: another way for each projection."""
    integer = {"type": "int", "symmetric": True}
    scheme = {
        "gate_proj": {**integer, "num_bits": 4, "strategy": "group", "group_size": 32},
        "up_proj": {**integer, "num_bits": 4, "strategy": "group", "group_size": 32},
        "down_proj": {"type": "float", "num_bits": 4, "strategy": "group", "group_size": 32},
        "q_proj": {"type": "float", "num_bits": 8, "strategy": "channel"},
        "k_proj": {**integer, "num_bits": 8, "strategy": "channel"},
        "v_proj": {"type": "int", "symmetric": False, "num_bits": 8, "strategy": "channel"},
        "o_proj": {
            "type": "float",
            "num_bits": 4,
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": torch.float8_e4m3fn,
        },
    }.get(name.split(".")[-2])
    if scheme is None:
        return None
    targets = [f"re:.*{name.split('.')[-2]}$"]
    return QuantizationScheme(targets=targets, weights=QuantizationArgs(**scheme))


COMPRESSED = {
    "gate_proj": "pack-quantized",
    "up_proj": "pack-quantized",
    "down_proj": "mxfp4-pack-quantized",
    "q_proj": "float-quantized",
    "k_proj": "int-quantized",
    "v_proj": "pack-quantized",
    "o_proj": "nvfp4-pack-quantized",
}


def scales_of(weight: torch.Tensor, scheme: QuantizationScheme) -> Tensors:
    """Scales, and zero points where there are any, by the largest weights of a group."""
    args = scheme.weights
    groups = weight.float().unflatten(-1, (-1, args.group_size or weight.shape[-1]))
    if not args.symmetric:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / 255).bfloat16()
        zero = (-128 - low / scale.float()).round().clamp(-128, 127).to(torch.int8)
        return {"weight_scale": scale, "weight_zero_point": zero}
    largest = groups.abs().amax(-1)
    if args.group_size == 16:
        whole = (448 * 6 / largest.max()).reshape(1)
        scale = (whole * largest / 6).to(torch.float8_e4m3fn).float()
        return {"weight_scale": scale, "weight_global_scale": whole}
    if args.type == "float" and args.num_bits == 4:
        return {"weight_scale": (largest / 6).log2().ceil().exp2().bfloat16()}
    limit = 448 if args.type == "float" else 2 ** (args.num_bits - 1) - 1
    return {"weight_scale": (largest / limit).bfloat16()}


def compressed_qwen3_moe(folder: Path, prompt: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    packed: Tensors = {}
    unpacked: Tensors = {}
    groups = {}
    for name, tensor in floats_of(qwen3_moe(64), folder).items():
        scheme = scheme_of(name)
        if scheme is None or name.startswith("lm_head"):
            packed[name] = unpacked[name] = tensor
            continue
        kind = name.split(".")[-2]
        compressor = BaseCompressor.get_value_from_registry(COMPRESSED[kind])
        made = compressor.compress({"weight": tensor, **scales_of(tensor, scheme)}, scheme)
        path = name.removesuffix("weight")
        packed |= {f"{path}{part}": value for part, value in made.items()}
        unpacked[name] = compressor.decompress(made, scheme)["weight"].bfloat16()
        groups[kind] = {**json.loads(scheme.model_dump_json()), "format": COMPRESSED[kind]}
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    state(
        folder,
        quant_method="compressed-tensors",
        format="mixed-precision",
        config_groups=groups,
        ignore=["lm_head"],
        quantization_status="compressed",
    )
    return unpacked, logits_of_floats(unpacked, folder, prompt)


def mxfp4_gpt_oss(folder: Path, prompt: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Random codes and scales: every byte is an mxfp4 code. Weights are [n_experts, out, in]."""
    packed: Tensors = {}
    unpacked: Tensors = {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in floats_of(gpt_oss(), folder).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = tensor
            continue
        n_experts, d_in, d_out = tensor.shape
        shape = (n_experts, d_out, d_in // 32)
        blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 125, shape, generator=generator, dtype=torch.uint8)
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
        floats = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        unpacked[name] = floats.transpose(1, 2).contiguous()
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    state(
        folder,
        quant_method="mxfp4",
        modules_to_not_convert=[
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    )
    return unpacked, logits_of(folder, prompt)


def nvfp4(folder: Path) -> None:
    """A layer as ModelOpt has it, and as its code unpacks it to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (8, 32), generator=generator, dtype=torch.uint8)
    codes[0] = torch.arange(32) * 8
    scales = torch.rand(8, 4, generator=generator).mul(448).to(torch.float8_e4m3fn)
    whole = torch.tensor(0.00037)
    tensor = NVFP4QTensor((8, 64), torch.bfloat16, codes)
    unpacked = tensor.dequantize(
        scale=scales, double_scale=whole, block_sizes={-1: 16}, dtype=torch.bfloat16
    )
    tensors = {
        "x.weight": codes,
        "x.weight_scale": scales,
        "x.weight_scale_2": whole,
        "x.input_scale": torch.tensor(0.5),
        "unpacked": unpacked,
    }
    save_file(tensors, folder / "modelopt.safetensors")


def fp8_scales(folder: Path) -> None:
    """Tensors of every kind of scale in `scales.safetensors`: codes x, scales x_scale_inv, and
    x_unpacked as transformers unpacks them."""
    generator = torch.Generator().manual_seed(0)
    every_code = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    numbers = every_code[(every_code & 127) != 127].repeat(2)[:480]
    exponents = torch.tensor([[1, 127, 254, 140]], dtype=torch.uint8)
    scales = {
        "tensor": torch.tensor(0.37),
        "matrix": torch.tensor([[0.37]]),
        "rows": torch.rand(12, 1, generator=generator),
        "columns": torch.rand(1, 10, generator=generator),
        "blocks": torch.rand(3, 5, generator=generator).half(),
        "experts": torch.rand(2, 1, 1, generator=generator),
        "expert_blocks": torch.rand(2, 3, 5, generator=generator).bfloat16(),
        "exponents": exponents,
        "e8m0": exponents.view(torch.float8_e8m0fnu),
    }
    tensors: Tensors = {}
    for name, scale in scales.items():
        codes = numbers.reshape(2, 6, 40) if scale.ndim == 3 else numbers.reshape(12, 40)
        if name == "tensor":
            codes = every_code
        codes = codes.view(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = codes.clone(), scale.clone()
        tensors[f"{name}_unpacked"] = Fp8Dequantize(None)._dequantize_one(
            codes, scale, output_dtype=torch.float32
        )
    save_file(tensors, folder / "scales.safetensors")


CASES: dict[str, Callable[[Path, torch.Tensor], tuple[Tensors, torch.Tensor]]] = {
    "compressed_qwen3_moe": compressed_qwen3_moe,
    "fp8_deepseek_v3": fp8_deepseek_v3,
    "fp8_qwen3_moe": fp8_qwen3_moe,
    "mxfp4_gpt_oss": mxfp4_gpt_oss,
}


# Single tensors, of no model.
TENSORS: dict[str, Callable[[Path], None]] = {"fp8_scales": fp8_scales, "nvfp4": nvfp4}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def capture(name: str, out: Path) -> None:
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name in TENSORS:
        TENSORS[name](folder)
    else:
        capture_model(name, folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def capture_model(name: str, folder: Path) -> None:
    prompt = torch.randint(64, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1))
    unpacked, logits = CASES[name](folder, prompt)
    digests = {name: digest(tensor) for name, tensor in sorted(unpacked.items())}
    (folder / "unpacked.json").write_text(json.dumps(digests, indent=0) + "\n")
    golden = {"prompt": prompt.int(), "logits": logits}
    if name == "compressed_qwen3_moe":  # the one weight that MLX's packing has to round
        golden["v_proj"] = unpacked["model.layers.0.self_attn.v_proj.weight"]
    save_file(golden, folder / "golden.safetensors")
    (folder / "generation_config.json").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "case", nargs="*", help=f"any of {', '.join([*CASES, *TENSORS])} (default: all)"
    )
    parser.add_argument("--out", type=Path, default=Path("tests/formats"))
    args = parser.parse_args()
    if unknown := sorted(set(args.case) - {*CASES, *TENSORS}):
        parser.error(f"unknown case {', '.join(unknown)}")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with torch.inference_mode():
        for name in args.case or [*CASES, *TENSORS]:
            capture(name, args.out)
            kilobytes = sum(f.stat().st_size for f in (args.out / name).iterdir()) / 1e3
            print(f"{name:20}{kilobytes:6.0f} KB")


if __name__ == "__main__":
    main()
