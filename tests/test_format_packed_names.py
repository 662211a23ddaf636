"""Packed layers that mlx-lm knows by other names, or in other parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import GOLDEN, Tensor, file_tensors, store_tensors
from format_cases import FORMATS, presentation_of, save_tensors

from flashmoe import repack
from flashmoe.checkpoint.headers import read_header
from flashmoe.dtypes import array_bytes
from flashmoe.repacking import schedule
from flashmoe.repacking.formats.bitsandbytes import _State, _state
from flashmoe.repacking.formats.contract import Packed

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


@pytest.fixture
def absorbed(source: Path) -> Path:
    """A DeepSeek packed as AWQ, the attention of which absorbs a projection in mlx-lm."""
    random = random_tensors()
    tensors: dict[str, Tensor] = {}
    for name, tensor in file_tensors(GOLDEN / "deepseek_v3" / "model.safetensors").items():
        (*_, d_in), path = tensor[1], name.removesuffix(".weight")
        kept = ("gate", "embed_tokens", "lm_head")
        if len(tensor[1]) != 2 or path.endswith(kept) or tensor[1][0] % 8:
            tensors[name] = tensor
            continue
        d_out, n_groups = tensor[1][0], d_in // 32
        tensors[f"{path}.qweight"] = random("I32", (d_in, d_out // 8))
        tensors[f"{path}.qzeros"] = random("I32", (n_groups, d_out // 8))
        tensors[f"{path}.scales"] = random("F16", (n_groups, d_out))
    source.mkdir()
    save_tensors(source / "model.safetensors", tensors)
    config = json.loads((GOLDEN / "deepseek_v3" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (source / "config.json").write_text(json.dumps(config))
    return source


def test_a_projection_that_attention_absorbs_stays_exact(absorbed: Path, dest: Path) -> None:
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


@pytest.mark.parametrize("case", ["awq_qwen3_moe", "gptq_mixtral", "gptq_act_order_qwen3_moe"])
def test_a_large_layer_is_made_in_parts(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = 32 if "act_order" in case else None
    whole = store_tensors(repack(FORMATS / case, tmp_path / "whole", bits=bits))
    monkeypatch.setattr(schedule, "MIXED_VALUES", 100)
    assert store_tensors(repack(FORMATS / case, tmp_path / "parts", bits=bits)) == whole
