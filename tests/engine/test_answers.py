"""Prompts in, pieces out: what `generate` and `stream` make of their arguments."""

from tests.support.answers import BARN, BARN_ANSWER, HELLO, HELLO_ANSWER
from tests.support.sessions import tokens


def test_text_messages_and_ids_say_the_same(demo):
    message = {"role": "user", "content": BARN}
    ids = demo.tokenizer.apply_chat_template([message], add_generation_prompt=True)
    answers = [demo.generate(prompt) for prompt in (BARN, [message], ids)]
    assert answers == [BARN_ANSWER] * 3


def test_text_without_the_template(demo):
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert demo.generate(text, template=False) == HELLO_ANSWER


def test_pieces_add_up_to_the_answer(demo):
    pieces = list(demo.stream(BARN))
    assert "".join(piece.text for piece in pieces) == BARN_ANSWER
    assert demo.tokenizer.decode(tokens(pieces)) == BARN_ANSWER
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert pieces[-1].token is None
    assert all(piece.token is not None for piece in pieces[:-1])


def test_pieces_come_as_they_are_generated(demo):
    before = demo.totals()
    stream = demo.stream(BARN)
    assert demo.totals().generated_tokens == before.generated_tokens
    assert next(stream).text == "An"
    assert demo.totals().generated_tokens == before.generated_tokens + 1
    stream.close()
    assert demo.generate(HELLO) == HELLO_ANSWER


def test_a_limit_of_tokens(demo):
    pieces = list(demo.stream(BARN, 3))
    assert BARN_ANSWER.startswith("".join(piece.text for piece in pieces))
    assert len(tokens(pieces)) == 3
    assert pieces[-1].finish_reason == "length"
    assert demo.generate(BARN, max_new_tokens=3) == "".join(piece.text for piece in pieces)


def test_options_of_generate(demo):
    drawn = [demo.generate(BARN, 12, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert demo.generate(BARN, temperature=1.0, top_k=1) == BARN_ANSWER
    seen = []
    demo.generate(BARN, 2, progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] > 5


def test_two_streams_at_once(demo):
    one, two = demo.stream(BARN), demo.stream(HELLO)
    texts = ["", ""]
    for _ in range(40):
        for i, stream in enumerate((one, two)):
            piece = next(stream, None)
            texts[i] += piece.text if piece else ""
    assert texts == [BARN_ANSWER, HELLO_ANSWER]
