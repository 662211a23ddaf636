"""Where an answer ends: a stop id, the limit of new tokens, a full context."""

import pytest

from flashmoe import OptionError, PromptError
from flashmoe.generation.report import Ledger
from flashmoe.generation.session import Piece
from tests.support.sessions import answer, draw, session_of, tokens, watch_passes


def test_a_stop_id_ends_the_answer(qwen):
    ids = draw(6, 9)
    free = answer(session_of(qwen), ids, 20)
    stop = free[5]
    at = free.index(stop)
    ledger = Ledger()
    pieces = list(session_of(qwen, stop=[stop, 999], ledger=ledger).stream(ids, max_new_tokens=20))
    assert tokens(pieces) == free[:at]
    assert pieces[-1] == Piece(".", None, "stop")
    assert ledger.totals().generated_tokens == at + 1


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_limit_of_new_tokens(qwen, count):
    ids = draw(6, 9)
    pieces = list(session_of(qwen).stream(ids, max_new_tokens=count))
    assert tokens(pieces) == answer(session_of(qwen), ids, 20)[:count]
    assert [piece.finish_reason for piece in pieces] == [None] * count + ["length"]
    assert [piece.text for piece in pieces] == [f"t{t} " for t in tokens(pieces)] + ["."]


def test_a_stop_id_on_the_last_token_allowed(qwen):
    ids = draw(6, 9)
    stop = answer(session_of(qwen), ids, 1)[0]
    pieces = list(session_of(qwen, stop=[stop]).stream(ids, max_new_tokens=1))
    assert pieces == [Piece(".", None, "stop")]


@pytest.mark.parametrize("count", [0, -1])
def test_no_new_tokens(qwen, count):
    with pytest.raises(OptionError, match=f"at least 1, not {count}"):
        session_of(qwen).stream([1], max_new_tokens=count)


def test_a_prompt_that_exceeds_the_context(qwen):
    with pytest.raises(PromptError, match="has 11 tokens but the context holds 10"):
        session_of(qwen, context=10).stream(draw(7, 11))


@pytest.mark.parametrize(("prompt", "room"), [(10, 1), (9, 2), (6, 5)])
def test_a_context_that_fills_up(qwen, monkeypatch, prompt, room):
    """The last token is never fed, so it needs no place."""
    ids = draw(7, prompt)
    fed = watch_passes(qwen, monkeypatch)
    pieces = list(session_of(qwen, context=10).stream(ids, max_new_tokens=100))
    assert len(tokens(pieces)) == room
    assert pieces[-1].finish_reason == "length"
    assert sum(fed) == 10


def test_a_context_of_many_turns(qwen):
    session = session_of(qwen, context=30)
    history = draw(8, 12)
    history += answer(session, history, 10)
    with pytest.raises(PromptError, match="has 32 tokens"):
        session.stream([*history, *draw(9, 10)])
    assert len(answer(session, [*history, 5], 100)) == 8
