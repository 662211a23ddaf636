"""Turns of a conversation: only what is new is fed, and the answer is a new session's."""

import pytest

from flashmoe.generation.report import Ledger
from tests.support.scripted import VOCABULARY
from tests.support.sessions import answer, draw, resident_model, session_of

# Families by how their caches forget: by trimming, or only by starting anew.
TRIMMED = {
    "qwen3_moe": {},
    "deepseek_v32": {},
    "gpt_oss": {"sliding_window": 64},
    "mistral4": {},
}
RESTARTED = (
    "gpt_oss",  # a window of 4 tokens, long since full
    "jamba",
    "lfm2_moe",
    "longcat_flash_ngram",
    "nemotron_h",
    "qwen3_next",
)


def fed_when_diverging(model, kept):
    """How many tokens are fed for a second turn that keeps so much of the first and adds 5."""
    ledger = Ledger()
    session = session_of(model, ledger=ledger)
    first = draw(1, 17)
    history = [*first, *answer(session, first)]
    fed = ledger.totals().fed_tokens
    second = [*history[:kept], (history[kept] + 1) % VOCABULARY, *draw(3, 4)]
    expected = answer(session_of(model), second)
    assert answer(session, second) == expected
    return ledger.totals().fed_tokens - fed


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next", "llama4"])
def test_a_second_turn_feeds_only_what_is_new(family):
    model = resident_model(family)
    ledger = Ledger()
    session = session_of(model, ledger=ledger)
    first = draw(1, 17)
    said = answer(session, first)
    assert ledger.totals().fed_tokens == 17
    # The last token of an answer has been sampled but not fed.
    second = [*first, *said, *draw(2, 9)]
    expected = answer(session_of(model), second)
    assert answer(session, second) == expected
    assert ledger.totals().fed_tokens == 17 + 9 + 1


@pytest.mark.parametrize("family", TRIMMED)
@pytest.mark.parametrize("kept", [1, 8, 16, 20])
def test_a_diverging_turn_is_trimmed(family, kept):
    model = resident_model(family, **TRIMMED[family])
    assert fed_when_diverging(model, kept) == 5


@pytest.mark.parametrize("family", RESTARTED)
def test_a_diverging_turn_starts_anew_where_caches_cannot_be_trimmed(family):
    assert fed_when_diverging(resident_model(family), kept=9) == 9 + 5


@pytest.mark.parametrize("family", [*RESTARTED, "llama4", "deepseek_v32"])
def test_a_marked_place_can_be_come_back_to(family):
    model = resident_model(family)
    ledger = Ledger()
    session = session_of(model, ledger=ledger)
    answer(session, draw(1, 17))
    known = session.mark()
    for token in (7, 7, 9, 7):
        before = ledger.totals().fed_tokens
        found = answer(session, [*known, token], 4)
        assert ledger.totals().fed_tokens == before + 1
        assert found == answer(session_of(model), [*known, token], 4)


def test_a_mark_behind_other_tokens_is_none():
    session = session_of(resident_model("qwen3_next"))
    answer(session, draw(1, 17))
    known = session.mark()
    other = [*known[:5], (known[5] + 1) % VOCABULARY, *known[6:]]
    for ids in (other, [*known, 7], [*other, 7]):
        assert answer(session, ids, 4) == answer(session_of(resident_model("qwen3_next")), ids, 4)


@pytest.mark.parametrize("kept", [3, 13, 14, 15, 18, 22])
def test_chunked_attention_forgets_what_it_has_dropped(kept):
    """llama4 attends within chunks of 8 tokens, and its cache drops what lies further back."""
    model = resident_model("llama4")
    session = session_of(model)
    first = draw(1, 20)
    history = [*first, *answer(session, first, 4)]
    second = [*history[:kept], (history[kept] + 1) % VOCABULARY, *draw(3, 4)]
    expected = answer(session_of(model), second, 12)
    assert answer(session, second, 12) == expected


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_the_same_prompt_again(family):
    session = session_of(resident_model(family))
    ids = draw(4, 12)
    answers = [answer(session, ids) for _ in range(3)]
    assert answers[1:] == answers[:-1]


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "gpt_oss"])
def test_a_prompt_that_is_a_prefix_of_what_was_fed(family):
    session = session_of(resident_model(family))
    ids = draw(4, 12)
    answer(session, ids)
    assert answer(session, ids[:7]) == answer(session_of(resident_model(family)), ids[:7])


def test_five_turns():
    for family in ("qwen3_moe", "qwen3_next"):
        model = resident_model(family)
        session = session_of(model)
        history = []
        for turn in range(5):
            history += draw(10 + turn, 5)
            expected = answer(session_of(model, chunk=64), history, 4)
            assert answer(session, history, 4) == expected
            history += expected


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_the_chunk_size_does_not_change_the_answer(chunk):
    for family in ("qwen3_moe", "gpt_oss", "qwen3_next"):
        ids = draw(5, 15)
        expected = answer(session_of(resident_model(family), chunk=5), ids)
        assert answer(session_of(resident_model(family), chunk=chunk), ids) == expected
