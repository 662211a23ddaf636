"""Prompts: text, token ids or messages, with a chat template and without."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe import PromptError
from flashmoe.generation.prompt import encode_prompt
from tests.support.refusals import refused
from tests.support.scripted import Words
from tests.support.sessions import answer, session_of


class Chatty(Words):
    """Words with a template that knows two roles: t1 or t2, the content, and t3 at the end."""

    has_chat_template = True

    def apply_chat_template(self, messages, add_generation_prompt):
        assert add_generation_prompt
        ids = []
        for message in messages:
            if message["role"] not in ("system", "user"):
                raise ValueError(f"no role {message['role']}")
            ids += [1 if message["role"] == "system" else 2, *self.encode(message["content"])]
        return [*ids, 3]


USER = {"role": "user", "content": "t9"}


@pytest.mark.parametrize(
    ("prompt", "options", "ids"),
    [
        ("t7 t8", {}, [2, 7, 8, 3]),
        ("t7 t8", {"system": "t5"}, [1, 5, 2, 7, 8, 3]),
        ("t7 t8", {"template": False}, [7, 8]),
        ([USER], {}, [2, 9, 3]),
        ([USER], {"template": False}, [2, 9, 3]),
        ((USER, USER), {}, [2, 9, 2, 9, 3]),
        ([4, 127, 0], {}, [4, 127, 0]),
        ((4,), {"template": False}, [4]),
    ],
    ids=str,
)
def test_prompts_with_a_template(prompt, options, ids):
    assert encode_prompt(Chatty(), prompt, **options) == ids


def test_text_without_a_template():
    assert encode_prompt(Words(), "t7 t8") == [7, 8]


@pytest.mark.parametrize(
    "ids", [np.array([4, 5]), mx.array([4, 5]), list(np.array([4, 5]))], ids=type
)
def test_ids_from_arrays(ids):
    assert encode_prompt(Words(), ids) == [4, 5]


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "options", "words"),
    [
        (Words(), [USER], {}, "no chat template"),
        (Words(), "t7", {"system": "t5"}, "a system prompt needs a chat template"),
        (Chatty(), "t7", {"system": "t5", "template": False}, "a system prompt needs"),
        (Chatty(), [USER], {"system": "t5"}, "system"),
        (Chatty(), [4, 5], {"system": "t5"}, "system"),
        (Chatty(), [{"role": "tool", "content": "t1"}], {}, "rejects these messages: no role tool"),
        (Chatty(), [{"content": "t1"}], {}, "needs a role and a content"),
        (Chatty(), [{"role": "user"}], {}, "needs a role and a content"),
        (Words(), [4, 128], {}, "token id 128 is outside the vocabulary of 128"),
        (Words(), [-1], {}, "token id -1 is outside"),
        (Words(), [2**70], {}, "is outside the vocabulary"),
        (Words(), "", {}, "the prompt is empty"),
        (Words(), " \n", {}, "the prompt is empty"),
        (Words(), [], {}, "the prompt is empty"),
        (Words(), [4, USER], {}, "a prompt is a text, a list of token ids or"),
        (Words(), [4.0], {}, "a prompt is a text, a list of token ids or"),
        (Words(), ["t4"], {}, "a prompt is a text, a list of token ids or"),
        (Words(), [[4, 5]], {}, "a prompt is a text, a list of token ids or"),
        (Words(), 4, {}, "a prompt is a text, a list of token ids or"),
        (Words(), None, {}, "a prompt is a text, a list of token ids or"),
    ],
)
def test_impossible_prompts(tokenizer, prompt, options, words):
    with refused(PromptError, words):
        encode_prompt(tokenizer, prompt, **options)


def test_an_impossible_prompt_is_refused_before_the_first_piece(qwen):
    session = session_of(qwen)
    with pytest.raises(PromptError):
        session.stream([500])
    assert len(answer(session, [5], 2)) == 2
