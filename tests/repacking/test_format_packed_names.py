"""Packed layers that mlx-lm knows by other names, or in other parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flashmoe import repack
from flashmoe.base.dtypes import MLX_DTYPES, array_bytes
from flashmoe.checkpoint.headers import read_header
from flashmoe.kernels.packing import pack_codes
from flashmoe.repacking import schedule
from flashmoe.repacking.formats.bitsandbytes import _State, _state
from flashmoe.repacking.formats.contract import Packed
from flashmoe.repacking.formats.packed_ints import awq_unpacked
from tests.support.checkpoints import GOLDEN, Tensor, as_tensor, file_tensors, store_tensors
from tests.support.format_cases import FORMATS, presentation_of, save_tensors

KV_B = "model.layers.1.self_attn.kv_b_proj"
Random = Callable[[str, tuple[int, ...]], Tensor]


def random_tensors(seed: int = 0) -> Random:
    generator = np.random.default_rng(seed)

    def tensor(dtype: str, shape: tuple[int, ...]) -> Tensor:
        if dtype == "F16":
            values = generator.uniform(0.001, 0.01, shape).astype(np.float16)
        else:
            values = generator.integers(-(2**31), 2**31, shape).astype(np.int32)
        return dtype, shape, values.tobytes()

    return tensor


def save_packed(family: str, folder: Path, **settings: Any) -> Path:
    """Writes a family's golden checkpoint with random codes for its linear layers."""
    random = random_tensors()
    tensors: dict[str, Tensor] = {}
    stored = file_tensors(GOLDEN / family / "model.safetensors")
    for name, tensor in sorted(stored.items()):
        path, shape = name.removesuffix(".weight"), tensor[1]
        kept = ("gate", "embed_tokens", "embeddings", "lm_head")
        if len(shape) != 2 or path.endswith(kept) or shape[0] % 32 or shape[1] % 32:
            tensors[name] = tensor
            continue
        d_out, d_in = shape
        words = (d_in, d_out // 8) if settings["quant_method"] == "awq" else (d_in // 8, d_out)
        tensors[f"{path}.qweight"] = random("I32", words)
        tensors[f"{path}.qzeros"] = random("I32", (d_in // 32, d_out // 8))
        tensors[f"{path}.scales"] = random("F16", (d_in // 32, d_out))
        if settings.get("desc_act"):
            order = np.arange(d_in, dtype=np.int32) // 32
            tensors[f"{path}.g_idx"] = ("I32", (d_in,), order.tobytes())
    folder.mkdir()
    save_tensors(folder / "model.safetensors", tensors)
    config = json.loads((GOLDEN / family / "config.json").read_text())
    config["quantization_config"] = {"bits": 4, "group_size": 32, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", ["lfm2_moe", "minimax_m2", "nemotron_h", "qwen3_5_moe"])
def test_scales_go_where_sanitize_puts_weights(family: str, tmp_path: Path) -> None:
    """These families' sanitize renames `.weight` alone, or reads scales too."""
    packed = save_packed(family, tmp_path / "packed", quant_method="gptq")
    floats = save_packed(family, tmp_path / "floats", quant_method="gptq", desc_act=True)
    kept = store_tensors(repack(packed, tmp_path / "kept"))
    expected = store_tensors(repack(floats, tmp_path / "expected", bits=32))
    layers = {name.removesuffix(".scales") for name in kept if name.endswith(".scales")}
    assert any("switch_mlp" in path for path in layers)
    assert {n for n in kept if n.rpartition(".")[0] not in layers} == {
        n for n in expected if n.rpartition(".")[0] not in layers
    }
    for path in layers:
        words, scales, biases = (
            array_of(kept[f"{path}.{part}"]) for part in ("weight", "scales", "biases")
        )
        unpacked = mx.dequantize(words, scales, biases, group_size=32, bits=4)
        reference = array_of(expected[f"{path}.weight"])
        assert mx.allclose(unpacked, reference, rtol=0, atol=2**-11).item()


def array_of(tensor: Tensor) -> mx.array:
    dtype, shape, content = tensor
    return mx.array(np.frombuffer(content, np.uint8)).view(MLX_DTYPES[dtype]).reshape(shape)


def test_a_projection_that_attention_absorbs_stays_exact(source: Path, dest: Path) -> None:
    absorbed = save_packed("deepseek_v3", source, quant_method="awq")
    presentation = presentation_of(absorbed, modules={"up_proj", "q_a_proj"})
    assert f"{KV_B}.scales" not in presentation.stand_ins
    arrays = mx.load(str(absorbed / "model.safetensors"))
    config = json.loads((absorbed / "config.json").read_text())
    d_nope, d_v = config["qk_nope_head_dim"], config["v_head_dim"]
    kv_b = presentation.of(arrays)[f"{KV_B}.weight"].reshape(-1, d_nope + d_v, 32)
    tensors = store_tensors(repack(absorbed, dest))
    path = KV_B.removesuffix("kv_b_proj")
    for name, expected in (
        ("embed_q", kv_b[:, :d_nope].swapaxes(-1, -2)),
        ("unembed_out", kv_b[:, d_nope:]),
    ):
        dtype, shape, content = tensors[f"{path}{name}.weight"]
        expected = mx.contiguous(expected)
        mx.eval(expected)
        assert (dtype, shape, content) == ("F16", expected.shape, bytes(array_bytes(expected)))
    # Its neighbours are packed still.
    assert tensors[f"{path}q_b_proj.weight"][0] == "U32"


def test_digits_of_a_name_are_not_those_of_an_expert() -> None:
    """w1 and w2 have as many bytes, and other shapes."""
    header = read_header(FORMATS / "bnb_deepseek_v3" / "model.safetensors")
    tensors = {}
    asked: list[str] = []

    def read(name: str) -> bytes:
        asked.append(name)
        shape = [64, 32] if ".w2." in name else [32, 64]
        stated = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": shape}
        return json.dumps({**stated, "nested_blocksize": 256, "nested_offset": 0.5}).encode()

    path = "model.layers.0.mlp.experts.0.up_proj.weight"
    names = [f"model.layers.{i}.experts.{i}.w{w}.weight" for i in range(4) for w in (1, 2)]
    for name in names:
        tensors |= {name + key.removeprefix(path): i for key, i in header.items() if path in key}
    packed = Packed("the checkpoint", {}, {}, tensors, read)
    known: dict[tuple[Any, ...], _State] = {}
    shapes = [_state(packed, name, "nf4", known).shape for name in names]
    assert shapes == [(32, 64), (64, 32)] * 4
    assert len(asked) == 2


def test_gemv_is_another_layout_of_the_same(source: Path, dest: Path, tmp_path: Path) -> None:
    gemm = FORMATS / "awq_qwen3_moe"
    presentation = presentation_of(gemm)
    arrays = mx.load(str(gemm / "model.safetensors"))
    seen = presentation.of(arrays)
    tensors = {n: as_tensor(array) for n, array in seen.items() if n not in presentation.stand_ins}
    for path in sorted(n.removesuffix(".scales") for n in seen if n.endswith(".scales")):
        scales = mx.pad(seen[f"{path}.scales"], [(0, 0), (0, 32 - seen[f"{path}.scales"].shape[1])])
        zeros = mx.pad(awq_unpacked(arrays[f"{path}.qzeros"].view(mx.uint32)).T, [(0, 0), (0, 32)])
        tensors[f"{path}.scales"] = as_tensor(scales)
        tensors[f"{path}.qzeros"] = as_tensor(pack_codes(zeros[:, :32], 4).view(mx.int32))
        tensors[f"{path}.qweight"] = as_tensor(seen[f"{path}.weight"].view(mx.int32))
    source.mkdir()
    save_tensors(source / "model.safetensors", tensors)
    config = json.loads((gemm / "config.json").read_text())
    # Older checkpoints of AutoAWQ have their settings in a file of their own.
    stated = config.pop("quantization_config")
    own = {"zero_point": True, "q_group_size": stated["group_size"], "w_bit": 4, "version": "GEMV"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "quant_config.json").write_text(json.dumps(own))
    assert store_tensors(repack(source, dest)) == store_tensors(repack(gemm, tmp_path / "gemm"))


@pytest.mark.parametrize("case", ["awq_qwen3_moe", "gptq_mixtral", "gptq_act_order_qwen3_moe"])
def test_a_large_layer_is_made_in_parts(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = 32 if "act_order" in case else None
    whole = store_tensors(repack(FORMATS / case, tmp_path / "whole", bits=bits))
    monkeypatch.setattr(schedule, "MIXED_VALUES", 100)
    assert store_tensors(repack(FORMATS / case, tmp_path / "parts", bits=bits)) == whole
