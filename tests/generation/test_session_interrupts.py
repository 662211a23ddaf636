"""Answers cut short, by a person or an error: the next one is right all the same."""

import pytest

from flashmoe.generation.report import Ledger
from flashmoe.generation.session import Piece
from tests.support.sessions import answer, draw, resident_model, session_of, tokens, watch_passes


class After:
    """A condition that is false the first `count` times it is asked."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_an_interrupt_between_prompt_chunks(qwen, monkeypatch):
    ids = draw(1, 23)
    expected = answer(session_of(qwen), ids)
    fed = watch_passes(qwen, monkeypatch)
    ledger = Ledger()
    session = session_of(qwen, ledger=ledger)
    pieces = list(session.stream(ids, should_stop=After(2)))
    assert pieces == [Piece(".", None, "interrupt")]
    assert fed == [5, 5]
    assert (ledger.totals().fed_tokens, ledger.totals().generated_tokens) == (10, 0)
    # What had been fed is kept.
    assert answer(session, ids) == expected
    assert fed[2:5] == [5, 5, 2]


def test_an_interrupt_between_tokens(qwen, monkeypatch):
    ids = draw(1, 9)
    expected = answer(session_of(qwen), ids, 10)
    fed = watch_passes(qwen, monkeypatch)
    session = session_of(qwen)
    pieces = []
    for piece in session.stream(ids, max_new_tokens=10, should_stop=lambda: len(pieces) == 4):
        pieces.append(piece)
    assert tokens(pieces) == expected[:4]
    assert pieces[-1] == Piece(".", None, "interrupt")
    assert fed == [5, 3, 1, 1, 1, 1]
    assert answer(session, ids, 10) == expected


def test_an_interrupt_before_anything(qwen, monkeypatch):
    fed = watch_passes(qwen, monkeypatch)
    pieces = list(session_of(qwen).stream([3], should_stop=lambda: True))
    assert pieces[-1].finish_reason == "interrupt"
    assert tokens(pieces) == []
    assert len(fed) <= 1


def test_a_stream_that_nobody_reads_to_the_end(qwen):
    ids = draw(1, 9)
    session = session_of(qwen)
    stream = session.stream(ids, max_new_tokens=10)
    first = [next(stream).token, next(stream).token]
    stream.close()
    expected = answer(session_of(qwen), ids)
    assert first == expected[:2]
    assert answer(session, ids) == expected


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [0, 2, 5])
def test_an_error_inside_a_forward_pass(monkeypatch, family, error, failing):
    """Layers before the one that fails have consumed the tokens, the others have not."""
    model = resident_model(family)
    ids = draw(1, 14)
    history = draw(2, 6)
    expected = answer(session_of(model), ids)
    after = answer(session_of(model), [*ids, *expected, *history])
    session = session_of(model)
    layer = model.layers[-1]
    broken = After(failing)
    original = type(layer).__call__

    def breaking(self, *args, **kwargs):
        if self is layer and broken():
            raise error("broken")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(layer), "__call__", breaking)
        for _ in range(2):
            with pytest.raises(error, match="broken"):
                answer(session, ids)
    assert answer(session, ids) == expected
    assert answer(session, [*ids, *expected, *history]) == after
