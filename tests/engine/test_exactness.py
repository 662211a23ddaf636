"""Exactness (a) and (b): byte-equal logits at every bank size, and to stock mlx-lm.

Stock mlx-lm runs the same quantized checkpoint resident; both sides compute in float32. The
native kernel rounds otherwise than MLX, so it is held to (a) byte by byte and to (b) closely.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

import flashmoe
from flashmoe import FlashMoEModel
from flashmoe.kernels import attention
from flashmoe.memory.budget import layer_demands
from flashmoe.store.reader import Store
from tests.support.families import FAMILIES, load_resident, save_checkpoint
from tests.support.natives import compiled

PROMPT = [(7 * i + 3) % 101 for i in range(20)]
ANSWER = [5, 90, 41]
# Two rows of 36 tokens at top-2 or more pass 64 routed rows, where mlx-lm starts sorting them.
BATCH = [[(11 * i + 2) % 101 for i in range(36)], [(13 * i + 7) % 101 for i in range(36)]]


@dataclass(frozen=True)
class Case:
    """A family's store and the logits of the resident model."""

    store: Store
    expected: list[mx.array]


def logits(model: nn.Module) -> list[mx.array]:
    """Without a cache; prefill and decode with one; a batch."""
    cache = make_prompt_cache(model)
    outputs = [model(mx.array([PROMPT])), model(mx.array([PROMPT]), cache=cache)]
    outputs += [model(mx.array([[token]]), cache=cache) for token in ANSWER]
    outputs.append(model(mx.array(BATCH)))
    mx.eval(outputs)
    return outputs


def bank_bytes(store: Store, share: float) -> int:
    """A bank that holds `share` of the experts, at least one token's."""
    demands = layer_demands([layer.layout.unit for layer in store.manifest.layers], widen=True)
    return sum(d.slot_bytes * max(d.least, round(d.most * share)) for d in demands)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    save_checkpoint(folder / "checkpoint", request.param)
    resident = load_resident(folder / "checkpoint")
    store = flashmoe.repack(folder / "checkpoint", folder / "store")
    return Case(store, logits(resident))


@pytest.fixture(params=[0.0, 0.5, 1.0], ids=["minimum", "half", "full"])
def model(request: pytest.FixtureRequest, case: Case) -> Iterator[FlashMoEModel]:
    with FlashMoEModel(
        case.store, cache=bank_bytes(case.store, request.param), kernel="reference"
    ) as model:
        yield model


def test_logits_equal_the_resident_model(case: Case, model: FlashMoEModel) -> None:
    for ours, theirs in zip(logits(model.model), case.expected, strict=True):
        assert bool(mx.array_equal(ours, theirs))
    assert model.totals().misses > 0
    model.check_integrity()


@pytest.mark.parametrize("mode,bits,group_size", [("mxfp4", 4, 32), ("mxfp8", 8, 32)])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_other_modes(tmp_path: Path, family: str, mode: str, bits: int, group_size: int) -> None:
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(checkpoint, family, bits=bits, group_size=group_size, mode=mode)
    expected = logits(load_resident(checkpoint))
    store = flashmoe.repack(checkpoint, tmp_path / "store")
    for share in (0.0, 1.0):
        with FlashMoEModel(store, cache=bank_bytes(store, share), kernel="reference") as model:
            for ours, theirs in zip(logits(model.model), expected, strict=True):
                assert bool(mx.array_equal(ours, theirs))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
def test_16_bit_checkpoints_in_both_dtypes(tmp_path: Path, bits: int, dtype: mx.Dtype) -> None:
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(checkpoint, "qwen3_moe", bits=bits, dtype=dtype)
    store = flashmoe.repack(checkpoint, tmp_path / "store")
    for name in ("stored", "float32"):
        resident = load_resident(checkpoint)
        if name == "float32":
            resident.set_dtype(mx.float32)
        expected = logits(resident)
        with FlashMoEModel(store, cache="min", dtype=name, kernel="reference") as model:
            for ours, theirs in zip(logits(model.model), expected, strict=True):
                assert ours.dtype == theirs.dtype
                assert bool(mx.array_equal(ours, theirs))


def test_unquantized_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(checkpoint, "mixtral", bits=None, dtype=mx.bfloat16)
    resident = load_resident(checkpoint)
    resident.set_dtype(mx.float32)
    expected = logits(resident)
    store = flashmoe.repack(checkpoint, tmp_path / "store", bits=16)
    for share in (0.0, 1.0):
        with FlashMoEModel(store, cache=bank_bytes(store, share), kernel="reference") as model:
            for ours, theirs in zip(logits(model.model), expected, strict=True):
                assert bool(mx.array_equal(ours, theirs))


@compiled
def test_native_kernel_at_every_bank_size(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # These calls are small: without that they would attend with MLX.
    monkeypatch.setattr(attention, "LEAST_PRODUCTS", 0)
    outputs = []
    for share in (0.0, 0.5, 1.0):
        cache = bank_bytes(case.store, share)
        with FlashMoEModel(case.store, cache=cache, kernel="cpu") as model:
            outputs.append(logits(model.model))
    for smallest, half, full, theirs in zip(*outputs, case.expected, strict=True):
        assert bool(mx.array_equal(smallest, half))
        assert bool(mx.array_equal(smallest, full))
        scale = mx.abs(theirs).max().item()
        assert mx.abs(smallest - theirs).max().item() < 1e-4 * max(scale, 1.0)
