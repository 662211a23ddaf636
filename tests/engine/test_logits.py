"""The mlx-lm module inside a model: the same logits at every bank size, however it is called."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from flashmoe import FlashMoEModel
from flashmoe.bank.bank import LayerBank
from flashmoe.bank.eviction import LFU, LRU
from flashmoe.demo import DEMO_FOLDER
from flashmoe.kernels.select import auto_kernel
from tests.support.answers import CAPITAL, CAPITAL_ANSWER, HELLO, HELLO_ANSWER


def logits(model, ids):
    return np.array(model.model(mx.array([ids])))


def test_logits_of_the_module(demo):
    ids = demo.tokenizer.encode("A distinctive odor")
    out = demo.model(mx.array(ids)[None])
    assert out.shape == (1, len(ids), 4096)
    assert out.dtype == mx.float32
    assert np.isfinite(np.array(out)).all()


def test_logits_are_the_same_at_every_bank_size(demo, demo_store):
    ids = demo.tokenizer.encode(f"{CAPITAL} {CAPITAL_ANSWER}")
    expected = logits(demo, ids)
    least = demo.memory_plan.least_bank_bytes
    for cache, at_most in (("min", least), ("2MB", 2_000_000), (3_000_000, 3_000_000)):
        with FlashMoEModel.from_pretrained(demo_store, cache=cache) as model:
            assert least <= model.bank_bytes <= at_most
            for _ in range(2):
                np.testing.assert_array_equal(logits(model, ids), expected)
            model.check_integrity()


def test_kernels_by_name(demo, demo_store):
    ids = demo.tokenizer.encode("Define scent.")
    with FlashMoEModel.from_pretrained(demo_store, kernel="reference", cache="min") as model:
        np.testing.assert_allclose(logits(model, ids), logits(demo, ids), rtol=0, atol=1e-4)
    with FlashMoEModel.from_pretrained(demo_store, kernel=auto_kernel(), cache="min") as model:
        np.testing.assert_array_equal(logits(model, ids), logits(demo, ids))


def test_the_stored_dtype(demo, demo_store):
    ids = demo.tokenizer.encode("Define scent.")
    with FlashMoEModel.from_pretrained(demo_store, dtype="stored") as model:
        stored = dict(tree_flatten(model.model.parameters()))
        widened = dict(tree_flatten(demo.model.parameters()))
        assert stored.keys() == widened.keys()
        for name, array in stored.items():
            narrow = array.dtype == mx.bfloat16
            assert widened[name].dtype == (mx.float32 if narrow else array.dtype)
            assert mx.array_equal(array.astype(widened[name].dtype), widened[name]), name
        assert stored["model.norm.weight"].dtype == mx.bfloat16
        out = model.model(mx.array([ids]))
        assert out.dtype == mx.bfloat16
        stock, _ = load_model(DEMO_FOLDER)
        assert mx.array_equal(out, stock(mx.array([ids])))
        narrow_bytes = model.bank_bytes
    with FlashMoEModel.from_pretrained(demo_store, kernel="reference") as model:
        assert narrow_bytes < model.bank_bytes


def test_logits_are_the_same_with_any_policy(demo_store, monkeypatch):
    prompts = [mx.array([[7, 300, 12, 900, 41]]), *(mx.array([[t]]) for t in range(50, 90))]
    outputs, misses = [], set()
    for policy in (LFU, LRU):
        bank = partial(LayerBank, policy=policy)
        monkeypatch.setattr("flashmoe.model.load.LayerBank", bank)
        with FlashMoEModel.from_pretrained(demo_store, cache="4MB") as model:
            outputs.append(np.stack([np.array(model.model(prompt)[0, -1]) for prompt in prompts]))
            misses.add(model.totals().misses)
            model.check_integrity()
    assert len(misses) > 1
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])


@pytest.mark.parametrize("backwards", [False, True])
def test_lazy_passes_may_be_evaluated_late_and_in_any_order(small_demo, backwards):
    """The slots that an unevaluated pass reads are not overwritten before it has run."""
    rng = np.random.default_rng(0)
    prompts = [mx.array(rng.integers(3, 4096, (1, n))) for n in (1, 1, 5, 1, 2, 9, 1)]
    expected = [np.array(small_demo.model(prompt)) for prompt in prompts]
    lazy = [small_demo.model(prompt) for prompt in prompts]
    pairs = list(zip(lazy, expected, strict=True))
    for out, wanted in reversed(pairs) if backwards else pairs:
        np.testing.assert_array_equal(np.array(out), wanted)
    small_demo.check_integrity()


def test_a_lazy_pass_survives_a_generation(small_demo):
    expected = np.array(small_demo.model(mx.array([[7]])))
    lazy = small_demo.model(mx.array([[7]]))
    assert small_demo.generate(HELLO) == HELLO_ANSWER
    np.testing.assert_array_equal(np.array(lazy), expected)
