"""Capture checkpoints that other packages pack: AWQ, GPTQ and bitsandbytes.

Two kinds of files come out, all tiny. `packed_layers` has single layers of every variant with
the floats that the format's own package makes of them. A folder per format is a mixture-of-experts
checkpoint, with logits of Hugging Face transformers for those floats in float32.

The packing, and the floats, are by the packages themselves, on the CPU:

- AWQ: AutoAWQ 0.2.9, `WQLinear_GEMM` and `WQLinear_GEMV`, `dequantize_gemm`;
- GPTQ: AutoGPTQ 0.7.1, `QuantLinear` of `qlinear_cuda`, its weights taken out by multiplying with
  the identity; `gptq_v2` differs by one in each zero, as GPTQModel 7.7.0 converts it;
- bitsandbytes 0.50.2: its functions, and `QuantState` for the names of the tensors. Its generic
  dequantizing is taken, which is also its CPU kernel's where rows hold whole blocks; elsewhere that
  kernel is not what it packs (it is off by more than half of the largest weight).

AutoAWQ's and AutoGPTQ's calibration and kernels want a GPU and are not used: weights are random and
rounded to nearest here. Neither package can be imported whole beside a new transformers, so that
their modules are imported without the packages' own `__init__`.

This script needs torch, transformers, and the three packages (`pip install --no-deps`). It knows
nothing of mlx or of flashmoe.

    python scripts/capture_packed.py [--out tests/formats]
"""

import argparse
import importlib
import importlib.util
import json
import shutil
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import bitsandbytes
import golden_attention as attention
import golden_latent as latent
import torch
import transformers
from capture_golden import randomize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PROMPT_TOKENS = 16
VOCAB_SIZE = 32
GROUP = 32

Tensors = dict[str, Tensor]
# The tensors of a packed layer, and the floats [out, in] that they stand for.
PackedLayer = tuple[Tensors, Tensor]


def bare(module: str) -> types.ModuleType:
    """A module of a package whose `__init__` files are not run."""
    names = module.split(".")
    if names[0] not in sys.modules:
        folder = importlib.util.find_spec(names[0]).submodule_search_locations[0]
    else:
        folder = sys.modules[names[0]].__path__[0]
    for depth in range(1, len(names)):
        package = types.ModuleType(".".join(names[:depth]))
        package.__path__ = [str(Path(folder, *names[1:depth]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(module)


def rounded(weight: Tensor, bits: int, group: int, sym: bool, index: Tensor | None = None):
    """Scales and zeros [out, groups] of a weight [out, in] rounded to nearest; zeros are from 1 on,
    because a zero of 0 cannot be stated in the first version of GPTQ."""
    n_in = weight.shape[1]
    index = torch.arange(n_in) // group if index is None else index
    scales, zeros = [], []
    for number in range(int(index.max()) + 1):
        own = weight[:, index == number]
        if sym:
            scale = (own.abs().amax(1) * 2 / (2**bits - 1)).half().float()
            zero = torch.full_like(scale, 2 ** (bits - 1))
        else:
            low, high = own.amin(1).clamp(max=0), own.amax(1).clamp(min=0)
            scale = ((high - low) / (2**bits - 1)).half().float()
            zero = (-low / scale).round().clamp(1, 2**bits - 1)
        scales.append(scale)
        zeros.append(zero)
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def clipped(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, index: Tensor) -> Tensor:
    """The weight with every value within the codes' range, which the packages do not see to."""
    low = -zeros[:, index] * scales[:, index]
    return torch.maximum(torch.minimum(weight, low + (2**bits - 1) * scales[:, index]), low)


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return linear


def awq(weight: Tensor, group: int = GROUP, dtype: torch.dtype = torch.float16) -> PackedLayer:
    """The floats are of `dtype`: those of float32 are not rounded."""
    gemm = bare("awq.modules.linear.gemm")
    index = torch.arange(weight.shape[1]) // group
    scales, zeros = rounded(weight, 4, group, sym=False)
    linear = linear_of(clipped(weight, scales, zeros, 4, index))
    layer = gemm.WQLinear_GEMM.from_linear(linear, 4, group, scales=scales.T, zeros=zeros.T)
    tensors = {key: value.contiguous() for key, value in layer.state_dict().items()}
    floats = gemm.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.to(dtype), 4, group)
    return tensors, floats.T.contiguous()


def awq_gemv(weight: Tensor, group: int) -> PackedLayer:
    """AutoAWQ has no floats of this on the CPU: they are those of its GEMM layout."""
    gemv = bare("awq.modules.linear.gemv")
    index = torch.arange(weight.shape[1]) // group
    scales, zeros = rounded(weight, 4, group, sym=False)
    linear = linear_of(clipped(weight, scales, zeros, 4, index))
    layer = gemv.WQLinear_GEMV.from_linear(linear, 4, group, scales=scales, zeros=zeros)
    tensors = {key: value.contiguous() for key, value in layer.state_dict().items()}
    return tensors, awq(weight, group)[1]


def gptq(
    weight: Tensor,
    bits: int = 4,
    group: int = GROUP,
    sym: bool = True,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
) -> PackedLayer:
    """The floats are of `dtype`: those of float32 are not rounded."""
    qlinear = bare("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    n_out, n_in = weight.shape
    group = n_in if group == -1 else group
    index = torch.arange(n_in) // group
    if act_order:
        index = index[torch.randperm(n_in, generator=torch.Generator().manual_seed(n_in))]
    scales, zeros = rounded(weight, bits, group, sym, index)
    linear = linear_of(clipped(weight, scales, zeros, bits, index).half())
    layer = qlinear.QuantLinear(bits, group, n_in, n_out, False)
    layer.pack(linear, scales.half(), zeros.half(), index.int())
    tensors = {key: value.contiguous() for key, value in layer.state_dict().items()}
    layer.scales = layer.scales.to(dtype)
    return tensors, layer(torch.eye(n_in, dtype=dtype)).T.contiguous()


def gptq_v2(weight: Tensor) -> PackedLayer:
    tensors, floats = gptq(weight, sym=False)
    tensors["qzeros"] = tensors["qzeros"] + 0b00010001000100010001000100010001
    return tensors, floats


def bnb(
    weight: Tensor, kind: str, nested: bool, dtype: torch.dtype, block: int = 64
) -> PackedLayer:
    functional = bitsandbytes.functional
    data, state = functional.quantize_4bit(
        weight.to(dtype), blocksize=block, quant_type=kind, compress_statistics=nested
    )
    parts = state.as_dict(packed=True)
    tensors = {"weight": data} | {f"weight.{key}": value for key, value in parts.items()}
    absmax = state.absmax
    if nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    generic = importlib.import_module("bitsandbytes.backends.default.ops")._dequantize_4bit_compute
    floats = generic(data.reshape(-1), absmax, state.code, block, weight.shape, dtype)
    if weight.shape[1] % block == 0:
        assert torch.equal(floats, functional.dequantize_4bit(data, state))
    return tensors, floats


def bnb_int8(weight: Tensor) -> PackedLayer:
    functional = bitsandbytes.functional
    data, scb, _ = functional.int8_vectorwise_quant(weight.half())
    tensors = {"weight": data, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, functional.int8_vectorwise_dequant(data, scb)


def awq_settings(version: str, group: int) -> dict[str, object]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": version,
        "modules_to_not_convert": ["gate"],
    }


def gptq_settings(
    bits: int = 4, group: int = GROUP, sym: bool = True, act_order: bool = False, form: str = "gptq"
) -> dict[str, object]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": sym,
        "desc_act": act_order,
        "checkpoint_format": form,
    }


def bnb_settings(kind: str | None, nested: bool = False) -> dict[str, object]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": kind is not None,
        "load_in_8bit": kind is None,
        "bnb_4bit_quant_type": kind or "fp4",
        "bnb_4bit_use_double_quant": nested,
        "llm_int8_skip_modules": None,
    }


def layers() -> tuple[Tensors, dict[str, dict[str, object]]]:
    """Layers of every variant by name, their floats as `NAME.reference`, and their settings.
    Floats that would be large are their last rows."""
    generator = torch.Generator().manual_seed(0)

    def random(n_out: int, n_in: int) -> Tensor:
        spread = torch.rand(n_out, 1, generator=generator) + 0.5
        return torch.randn(n_out, n_in, generator=generator) * 0.05 * spread

    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    made: dict[str, tuple[PackedLayer, dict[str, object]]] = {
        "awq": (awq(random(32, 64)), awq_settings("gemm", GROUP)),
        "awq_gemv": (awq_gemv(random(32, 128), 64), awq_settings("gemv", 64)),
        "gptq_sym": (gptq(random(32, 64)), gptq_settings()),
        "gptq_v2": (gptq_v2(random(32, 64)), gptq_settings(sym=False, form="gptq_v2")),
        "gptq_rows": (gptq(random(32, 64), group=-1), gptq_settings(group=-1)),
        "gptq_act_order": (
            gptq(random(32, 64), sym=False, act_order=True),
            gptq_settings(sym=False, act_order=True),
        ),
        "bnb_nf4_nested": (bnb(random(33, 512), "nf4", True, brain), bnb_settings("nf4", True)),
        # Rows end within a block.
        "bnb_nf4": (bnb(random(20, 48), "nf4", False, half), bnb_settings("nf4")),
        "bnb_fp4": (bnb(random(16, 64), "fp4", False, single, 128), bnb_settings("fp4")),
        "bnb_fp4_nested": (bnb(random(16, 64), "fp4", True, brain), bnb_settings("fp4", True)),
        "bnb_int8": (bnb_int8(random(24, 32)), bnb_settings(None)),
    }
    for bits in (2, 3, 8):
        settings = gptq_settings(bits, sym=False)
        made[f"gptq_{bits}_bit"] = gptq(random(32, 64), bits, sym=False), settings
    tensors: Tensors = {}
    for name, ((parts, reference), _) in made.items():
        tensors |= {f"{name}.{key}": value.clone() for key, value in parts.items()}
        tensors[f"{name}.reference"] = (
            reference[-4:].clone() if name == "bnb_nf4_nested" else reference
        )
    return tensors, {name: settings for name, (_, settings) in made.items()}


def shrunk(
    config: transformers.PreTrainedConfig, **changes: object
) -> transformers.PreTrainedConfig:
    """The config with other sizes; experts are twice as wide as the model."""
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "tie_word_embeddings": True}
    if hasattr(config, "moe_intermediate_size"):
        sizes["moe_intermediate_size"] = 64
    for key, value in {**sizes, "intermediate_size": 64, **changes}.items():
        setattr(config, key, value)
    return config


def models() -> dict[
    str, tuple[transformers.PreTrainedConfig, dict[str, object], Callable[[Tensor], PackedLayer]]
]:
    """Per folder: a model, its settings, and what packs its layers."""
    qwen = shrunk(attention.qwen3_moe(), num_experts=4, num_hidden_layers=2, mlp_only_layers=[0])
    # Its attention is as wide as the model for mlx-lm, and AutoGPTQ packs 32 outputs at least.
    mixtral = shrunk(attention.mixtral(), num_local_experts=4, num_hidden_layers=1, hidden_size=64)
    mixtral.intermediate_size = 32
    deepseek = shrunk(latent.deepseek_v3(), n_routed_experts=4, n_group=2, topk_group=1)
    shrunk(deepseek, first_k_dense_replace=0, num_hidden_layers=1, tie_word_embeddings=False)
    ordered = shrunk(attention.qwen3_moe(), num_experts=4, num_hidden_layers=1, mlp_only_layers=[])
    return {
        "awq_qwen3_moe": (
            qwen,
            awq_settings("gemm", GROUP),
            lambda weight: awq(weight, dtype=torch.float32),
        ),
        "gptq_mixtral": (
            mixtral,
            gptq_settings(),
            lambda weight: gptq(weight, dtype=torch.float32),
        ),
        "gptq_act_order_qwen3_moe": (
            ordered,
            gptq_settings(sym=False, act_order=True),
            lambda weight: gptq(weight, sym=False, act_order=True),
        ),
        "bnb_deepseek_v3": (
            deepseek,
            bnb_settings("nf4", True),
            lambda weight: bnb(weight, "nf4", True, torch.bfloat16),
        ),
    }


def is_packed(name: str, tensor: Tensor) -> bool:
    """What all of the formats pack: linear layers, but for routers and the head."""
    kept = ("gate.weight", "embed_tokens.weight", "lm_head.weight")
    return tensor.ndim == 2 and not name.endswith(kept)


def capture(
    folder: Path,
    config: transformers.PreTrainedConfig,
    settings: Mapping[str, object],
    pack: Callable[[Tensor], PackedLayer],
) -> None:
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    randomize(model.eval(), 1, {})
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors: Tensors = {}
    floats: Tensors = {}
    for name, tensor in sorted(load_file(path).items()):
        if is_packed(name, tensor):
            parts, floats[name] = pack(tensor)
            module = name.removesuffix("weight")
            tensors |= {module + key: value.clone() for key, value in parts.items()}
        else:
            tensors[name] = floats[name] = tensor
    # Experts are put together again by transformers.
    save_file({name: tensor.float() for name, tensor in floats.items()}, path, {"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    )
    prompt = torch.randint(VOCAB_SIZE, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=prompt[None], use_cache=False).logits[0].float()
    save_file(tensors, path, {"format": "pt"})
    golden = {"prompt": prompt.int(), "logits": logits.contiguous()}
    save_file(golden, folder / "golden.safetensors")
    (folder / "generation_config.json").unlink(missing_ok=True)
    stated = json.loads((folder / "config.json").read_text())
    stated["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(stated, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tests/formats"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with torch.inference_mode():
        tensors, settings = layers()
        metadata = {name: json.dumps(own) for name, own in settings.items()}
        folder = out / "packed_layers"
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "layers.safetensors", metadata)
        (folder / "layers.safetensors").chmod(0o644)
        written = [folder / "layers.safetensors"]
        for name, (config, own, pack) in models().items():
            capture(out / name, config, own, pack)
            written += sorted((out / name).iterdir())
    for path in written:
        print(f"{path.relative_to(out)!s:40}{path.stat().st_size:8}")


if __name__ == "__main__":
    main()
