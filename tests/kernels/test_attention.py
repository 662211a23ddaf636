"""Models attend through the library, and nothing else in the process does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import base, qwen3_moe
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from flashmoe import FlashMoEModel, native
from flashmoe.checkpoint.architecture import probe_routing
from flashmoe.checkpoint.config import read_config
from flashmoe.kernels import attention
from flashmoe.model.attention_probe import ScoresProbe
from flashmoe.store.reader import open_store
from tests.support.families import FAMILIES, build_model
from tests.support.natives import compiled

PROMPT = mx.array([[(7 * i + 3) % 101 for i in range(70)]])
TOLERANCE = 1e-5
# A family for each way to attend: plain, windows, sinks, latent with added scores, chunks, hybrids.
WAYS = {
    "qwen3_moe": 6,
    "mimo_v2_flash": 6,
    "gpt_oss": 6,
    "deepseek_v3": 6,
    "deepseek_v32": 6,
    "llama4": 8,
    "gemma4": 6,
    "qwen3_next": 2,
    "longcat_flash": 8,
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Who attended: "library" or "mlx", at any size."""
    made: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(attention, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(native, "attend", counted("library", native.attend))
    mlx = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted("mlx", mlx))
    yield made


def logits(model: nn.Module) -> list[mx.array]:
    """A prompt and a token behind it."""
    cache = make_prompt_cache(model)
    outputs = [model(PROMPT, cache=cache), model(mx.array([[5]]), cache=cache)]
    mx.eval(outputs)
    return outputs


def tiny(family: str) -> nn.Module:
    model = build_model(FAMILIES[family], seed=0)
    mx.eval(model.parameters())
    return model


@compiled
@pytest.mark.parametrize("family", WAYS)
def test_families_attend_through_the_library(family: str, calls: list[str]) -> None:
    model = tiny(family)
    theirs = logits(model)
    assert calls == ["mlx"] * WAYS[family]
    calls.clear()
    attention.replace_attention(model)
    for ours, expected in zip(logits(model), theirs, strict=True):
        scale = max(mx.abs(expected).max().item(), 1.0)
        assert mx.abs(ours - expected).max().item() < TOLERANCE * scale
    assert calls == ["library"] * WAYS[family]


@compiled
def test_other_models_do_not(calls: list[str]) -> None:
    before = dict(vars(qwen3_moe))
    model, other = tiny("qwen3_moe"), tiny("qwen3_moe")
    theirs = logits(other)
    attention.replace_attention(model)
    # Both at once, in one process.
    thread = threading.Thread(target=lambda: [logits(model) for _ in range(3)])
    thread.start()
    for _ in range(3):
        assert all(
            bool(mx.array_equal(ours, expected))
            for ours, expected in zip(logits(other), theirs, strict=True)
        )
    thread.join()
    assert calls.count("library") == 3 * WAYS["qwen3_moe"]
    assert dict(vars(qwen3_moe)) == before
    assert all(type(layer.self_attn) is qwen3_moe.Attention for layer in other.layers)
    assert all(isinstance(layer.self_attn, qwen3_moe.Attention) for layer in model.layers)


@compiled
def test_a_module_stays_where_it_is() -> None:
    model = tiny("qwen3_moe")
    parameters = dict(nn.utils.tree_flatten(model.parameters()))
    modules = [layer.self_attn for layer in model.layers]
    attention.replace_attention(model)
    assert all(a is layer.self_attn for a, layer in zip(modules, model.layers, strict=True))
    assert len({type(module) for module in modules}) == 1
    after = dict(nn.utils.tree_flatten(model.parameters()))
    assert all(after[path] is parameters[path] for path in parameters)
    # Doing it twice changes nothing more.
    kind = type(modules[0])
    attention.replace_attention(model)
    assert type(modules[0]) is kind


@compiled
def test_what_stays_with_mlx(calls: list[str]) -> None:
    q, k = mx.ones((1, 4, 3, 8)), mx.ones((1, 2, 5, 8))

    def attend(q: mx.array, k: Any, cache: Any = None, mask: Any = None) -> None:
        attention.attend(q, k, k, cache=cache, scale=1.0, mask=mask)

    attend(q, k)
    assert calls == ["library"]
    calls.clear()
    attend(q.astype(mx.float16), k.astype(mx.float16))
    attend(q, k[:, :, :2], mask="causal")
    attend(q, k, mask=mx.zeros((3, 5), mx.float16))
    assert calls == ["mlx"] * 3
    calls.clear()
    cache = QuantizedKVCache(group_size=32, bits=8)
    keys, _ = cache.update_and_fetch(mx.ones((1, 2, 5, 64)), mx.ones((1, 2, 5, 64)))
    attend(mx.ones((1, 4, 3, 64)), keys, cache)
    assert calls == []


@compiled
def test_small_calls_stay_with_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    products = 4 * 3 * 5 * (8 + 8)
    q, k = mx.ones((1, 4, 3, 8)), mx.ones((1, 2, 5, 8))
    for least, covered in ((products, True), (products + 1, False)):
        monkeypatch.setattr(attention, "LEAST_PRODUCTS", least)
        assert attention.covers(q, k, k, None, None) is covered


def test_classes_that_do_not_attend() -> None:
    assert attention.attending_class(nn.Linear) is None
    assert attention.attending_class(qwen3_moe.Qwen3MoeDecoderLayer) is None

    class Other(nn.Module):
        def __call__(self, x: mx.array) -> mx.array:
            return mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0)

    assert attention.attending_class(Other) is None


def test_methods_keep_what_they_are() -> None:
    class Base(qwen3_moe.Attention):
        def size(self) -> int:
            return 1

    class Child(Base):
        def __call__(self, x: mx.array) -> mx.array:
            return x

    # Its own method replaces the inherited one that attends.
    assert attention.attending_class(Child) is None
    made = attention.attending_class(Base)
    assert made is not None
    ours, theirs = made.__call__, qwen3_moe.Attention.__call__
    assert ours is not theirs
    assert ours.__code__ is theirs.__code__  # type: ignore[attr-defined]
    assert ours.__defaults__ == theirs.__defaults__  # type: ignore[attr-defined]
    assert ours.__globals__[attention.NAME] is attention.attend  # type: ignore[attr-defined]
    assert theirs.__globals__[attention.NAME] is base.scaled_dot_product_attention  # type: ignore[attr-defined]
    assert made.__name__ == "Base"


@compiled
@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_a_kernel_decides(kernel: str, demo_store: Path, calls: list[str]) -> None:
    with FlashMoEModel(open_store(demo_store), cache="min", kernel=kernel) as model:
        calls.clear()
        mx.eval(model.model(PROMPT))
    assert set(calls) == {"library" if kernel == "cpu" else "mlx"}


@compiled
@pytest.mark.parametrize(
    "family,held",
    [
        ("qwen3_moe", False),
        ("gpt_oss", False),
        ("llama4", False),
        ("qwen3_next", False),
        # Scores of their own as a mask; an index of keys beside the cache; another function.
        ("deepseek_v3", True),
        ("minimax_m3_vl", True),
        ("deepseek_v41", True),
    ],
)
def test_who_holds_scores(family: str, held: bool) -> None:
    probe = ScoresProbe()
    routing = probe_routing(FAMILIES[family], probe.watch)
    assert probe.are_never_held(routing.caches) is not held


@compiled
def test_a_plan_counts_no_scores_that_are_never_held(demo_store: Path) -> None:
    taken = {}
    for dtype in ("stored", "float32"):
        with FlashMoEModel(open_store(demo_store), cache="min", kernel="cpu", dtype=dtype) as model:
            taken[dtype] = model.memory_plan.prompts.scratch_bytes
    heads = read_config(demo_store)["num_attention_heads"]
    assert taken["stored"] - taken["float32"] == 12 * heads * 256 * model.context
