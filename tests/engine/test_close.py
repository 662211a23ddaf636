"""Closing a model gives its files and memory back, and what is used afterwards says so."""

import mlx.core as mx
import pytest

from flashmoe import FlashMoEError, FlashMoEModel
from tests.support.answers import HELLO, HELLO_ANSWER
from tests.support.disk import open_descriptors


def test_closing(demo_store):
    before = len(open_descriptors())
    model = FlashMoEModel.from_pretrained(demo_store)
    assert model.generate(HELLO) == HELLO_ANSWER
    model.close()
    model.close()
    assert len(open_descriptors()) == before
    for use in (
        lambda: model.generate(HELLO),
        lambda: model.stream(HELLO),
        lambda: model.session(),
        lambda: model.model,
    ):
        with pytest.raises(FlashMoEError, match="closed"):
            use()
    assert model.totals().generated_tokens > 0


def test_a_with_block_closes(demo_store):
    with FlashMoEModel.from_pretrained(demo_store) as model:
        assert model.generate(HELLO, 1) == "Hello"
    with pytest.raises(FlashMoEError, match="closed"):
        model.generate(HELLO)


def test_a_with_block_closes_after_an_error(demo_store):
    with (
        pytest.raises(ZeroDivisionError),
        FlashMoEModel.from_pretrained(demo_store) as model,
    ):
        raise ZeroDivisionError
    with pytest.raises(FlashMoEError, match="closed"):
        model.generate(HELLO)


@pytest.mark.parametrize("cache", ["min", "1GB"])
def test_a_session_outlives_its_model_only_to_say_so(demo_store, cache):
    with FlashMoEModel.from_pretrained(demo_store, cache=cache) as model:
        session = model.session()
        list(session.stream(HELLO))
    with pytest.raises(FlashMoEError, match="closed"):
        list(session.stream(HELLO))


def test_closing_gives_memory_back(demo_store):
    before = mx.get_active_memory()
    with FlashMoEModel.from_pretrained(demo_store) as model:
        model.generate(HELLO)
        assert mx.get_active_memory() - before > model.bank_bytes
    assert mx.get_active_memory() - before < 1_000_000
