"""The bundled model answers what the README says, streamed and in stock mlx-lm."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx_lm
import pytest

import flashmoe
from flashmoe import FlashMoEModel
from flashmoe.checkpoint.config import read_config
from flashmoe.demo import DEMO_FOLDER
from flashmoe.engine.decide import choose_widening
from tests.support.answers import BARN, BARN_ANSWER, CAPITAL, CAPITAL_ANSWER, HELLO, HELLO_ANSWER

ANSWERS = {
    CAPITAL: CAPITAL_ANSWER,
    BARN: BARN_ANSWER,
    "Define scent.": "A distinctive odor that is pleasant.",
    HELLO: HELLO_ANSWER,
    "Who are you?": ("I am a tiny mixture-of-experts model that has read the WordNet dictionary."),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlashMoEModel]:
    store = flashmoe.repack(DEMO_FOLDER, tmp_path_factory.mktemp("demo") / "store")
    with FlashMoEModel(store, cache="min") as model:
        yield model


@pytest.mark.parametrize("question", ANSWERS)
def test_answers_from_the_smallest_bank(model: FlashMoEModel, question: str) -> None:
    assert model.generate(question, 40) == ANSWERS[question]


def test_wordnets_licence_travels_with_the_store(model: FlashMoEModel) -> None:
    licence = (model.store.path / "WORDNET-LICENSE").read_text()
    assert "Princeton University" in licence


def test_asks_for_float32_on_a_gpu_too() -> None:
    assert choose_widening(read_config(DEMO_FOLDER), "auto", on_cpu=False)
    assert not choose_widening({"torch_dtype": "bfloat16"}, "auto", on_cpu=False)


def test_stock_mlx_lm_loads_it() -> None:
    model, tokenizer = mlx_lm.load(str(DEMO_FOLDER))
    model.set_dtype(mx.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": CAPITAL}],
        add_generation_prompt=True,
    )
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=20) == CAPITAL_ANSWER
