"""One owner of a running model: any thread may ask, and nothing that ends early breaks it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashmoe import FlashMoEError, FlashMoEModel
from flashmoe.generation.session import Piece
from tests.support.answers import BARN, BARN_ANSWER, CAPITAL, CAPITAL_ANSWER, HELLO, HELLO_ANSWER

PATIENCE = 60.0
ANSWERS = {BARN: BARN_ANSWER, CAPITAL: CAPITAL_ANSWER, HELLO: HELLO_ANSWER}
# Longer than a prefill chunk, for what ends in the middle of one.
LONG = [(7 * i + 3) % 500 for i in range(600)]


@pytest.fixture(params=["min", "2MB"])
def model(request: pytest.FixtureRequest, demo_store: Path) -> Iterator[FlashMoEModel]:
    with FlashMoEModel.from_pretrained(demo_store, cache=request.param) as loaded:
        yield loaded


def ask(model: FlashMoEModel) -> None:
    """The next answer is right, and the bank is whole."""
    assert model.generate(BARN) == BARN_ANSWER
    model.check_integrity()


def test_threads_take_turns(model: FlashMoEModel) -> None:
    wrong: list[object] = []

    def work(questions: list[str]) -> None:
        for question in questions:
            try:
                answer = model.generate(question)
            except BaseException as error:
                wrong.append(error)
            else:
                if answer != ANSWERS[question]:
                    wrong.append((question, answer))

    orders = [[BARN, CAPITAL, HELLO, BARN], [CAPITAL, HELLO, BARN, CAPITAL]]
    threads = [threading.Thread(target=work, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert wrong == []
    model.check_integrity()
    reports = model.totals()
    assert reports.generated_tokens > 8 and reports.hits + reports.misses > 0


def test_a_dropped_stream(model: FlashMoEModel) -> None:
    stream = model.stream(CAPITAL)
    next(stream)
    next(stream)
    del stream
    gc.collect()
    answers: list[str] = []
    # Another thread would wait for ever if the turn were not free.
    thread = threading.Thread(target=lambda: answers.append(model.generate(BARN)), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert answers == [BARN_ANSWER]
    ask(model)


def test_cancelled_between_layers_of_a_prompt(model: FlashMoEModel) -> None:
    seen: list[int] = []
    pieces = list(
        model.stream(
            LONG,
            progress=lambda done, total: seen.append(done),
            should_stop=lambda: bool(seen) and 0 < seen[-1] < 100,
        )
    )
    assert [piece.finish_reason for piece in pieces] == ["interrupt"]
    assert pieces[-1].report.generated_tokens == 0
    # Within the first chunk of 256 tokens.
    assert 0 < seen[-1] < 100
    ask(model)


def test_cancelled_in_decode(model: FlashMoEModel) -> None:
    pieces: list[Piece] = []
    for piece in model.stream(CAPITAL, should_stop=lambda: len(pieces) == 3):
        pieces.append(piece)
    assert len(pieces) == 4 and pieces[-1].finish_reason == "interrupt"
    ask(model)


def test_a_waiting_call_can_be_given_up(model: FlashMoEModel) -> None:
    stream = model.stream(CAPITAL)
    next(stream)
    found: list[Piece] = []
    gone = threading.Event()

    def wait() -> None:
        found.extend(model.stream(BARN, should_stop=gone.is_set))

    thread = threading.Thread(target=wait)
    thread.start()
    gone.set()
    thread.join(PATIENCE)
    assert [(piece.text, piece.finish_reason) for piece in found] == [("", "interrupt")]
    stream.close()  # type: ignore[attr-defined]
    ask(model)


def test_closing_waits_for_an_answer(demo_store: Path) -> None:
    model = FlashMoEModel.from_pretrained(demo_store, cache="min")
    begun, answers = threading.Event(), []

    def work() -> None:
        text = ""
        for piece in model.stream(BARN):
            begun.set()
            text += piece.text
        answers.append(text)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(PATIENCE)
    model.close()
    thread.join(PATIENCE)
    assert answers == [BARN_ANSWER]
    with pytest.raises(FlashMoEError, match="closed"):
        model.generate(BARN)


def test_closing_cancels_an_answer(demo_store: Path) -> None:
    model = FlashMoEModel.from_pretrained(demo_store, cache="min")
    begun = threading.Event()
    last: list[Piece] = []

    def work() -> None:
        # No end of turn in sight.
        for piece in model.stream([5, 6, 7], 1500, temperature=10.0, seed=1):
            begun.set()
            last[:] = [piece]

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(PATIENCE)
    model.close(cancel=True)
    thread.join(PATIENCE)
    assert last[0].finish_reason == "interrupt"
    assert 0 < last[0].report.generated_tokens < 1500
    with pytest.raises(FlashMoEError, match="closed"):
        model.session()


def test_a_turn_for_the_module_itself(model: FlashMoEModel) -> None:
    done: list[str] = []
    with model.turn():
        thread = threading.Thread(target=lambda: done.append(model.generate(BARN)))
        thread.start()
        thread.join(0.3)
        assert done == []
        with pytest.raises(FlashMoEError, match="middle of a step"):
            model.generate(BARN)
    thread.join(PATIENCE)
    assert done == [BARN_ANSWER]


def test_figures_of_an_answer(model: FlashMoEModel) -> None:
    session = model.session()
    first = list(session.stream(BARN))[-1].report
    again = list(session.stream(BARN))[-1].report
    assert first.cached_tokens == 0 and again.cached_tokens == again.prompt_tokens - 1
    assert first.prompt_tokens == again.prompt_tokens
    assert first.generated_tokens == again.generated_tokens
    assert first.misses * model.store.manifest.layers[0].layout.record.stride == first.bytes_read
    total = model.totals()
    for name in ("prompt_tokens", "cached_tokens", "generated_tokens", "hits", "misses"):
        assert getattr(total, name) == getattr(first, name) + getattr(again, name)
    assert total.seconds.prefill == pytest.approx(first.seconds.prefill + again.seconds.prefill)
