"""gpt-oss as OpenAI published it: the very codes and scales, gate and up taken apart."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flashmoe import OptionError, repack
from flashmoe.store.layout import Quantization
from tests.support.checkpoints import mlx_arrays, store_tensors
from tests.support.format_cases import FORMATS, digest, digests

CASE = FORMATS / "mxfp4_gpt_oss"
LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


def test_the_codes_are_the_same(dest: Path) -> None:
    given = {name: np.array(a) for name, a in mlx_arrays(CASE).items() if a.dtype == mx.uint8}
    stored = store_tensors(repack(CASE, dest))
    for layer in LAYERS:
        parts = {
            "gate_proj": ("gate_up_proj", slice(0, None, 2)),
            "up_proj": ("gate_up_proj", slice(1, None, 2)),
            "down_proj": ("down_proj", slice(None)),
        }
        for projection, (name, rows) in parts.items():
            blocks = given[f"{layer}.{name}_blocks"][:, rows]
            scales = given[f"{layer}.{name}_scales"][:, rows]
            assert stored[f"{layer}.{projection}.weight"][2] == blocks.tobytes()
            assert stored[f"{layer}.{projection}.scales"][2] == scales.tobytes()


def test_they_mean_the_same(dest: Path) -> None:
    store = repack(CASE, dest)
    stored = store_tensors(store)
    found = {}
    for layer in LAYERS:
        floats = {}
        for projection in ("gate_proj", "up_proj", "down_proj"):
            words, scales = (stored[f"{layer}.{projection}.{p}"] for p in ("weight", "scales"))
            floats[projection] = mx.dequantize(
                mx.array(np.frombuffer(words[2], np.uint32).reshape(words[1])),
                mx.array(np.frombuffer(scales[2], np.uint8).reshape(scales[1])),
                group_size=32,
                bits=4,
                mode="mxfp4",
                dtype=mx.bfloat16,
            )
        gate, up = floats["gate_proj"], floats["up_proj"]
        pairs = mx.stack([gate, up], axis=2).reshape(gate.shape[0], -1, gate.shape[-1])
        found[f"{layer}.gate_up_proj"] = digest(pairs)
        found[f"{layer}.down_proj"] = digest(floats["down_proj"])
    assert found == digests(CASE)


def test_what_is_not_packed_stays(dest: Path) -> None:
    store = repack(CASE, dest)
    given, stored = mlx_arrays(CASE), store_tensors(store)
    assert store.manifest.quantization == {}
    names = [name for name in given if ".experts." not in name]
    assert "model.layers.0.self_attn.q_proj.weight" in names
    for name in names:
        assert stored[name][2] == np.array(given[name].view(mx.uint16)).tobytes()
    for layer in store.manifest.layers:
        assert set(layer.layout.projections.values()) == {Quantization(4, 32, "mxfp4")}


def test_it_is_packed_already(dest: Path) -> None:
    with pytest.raises(OptionError, match="bit for bit"):
        repack(CASE, dest, bits=4)
    assert not dest.exists()
