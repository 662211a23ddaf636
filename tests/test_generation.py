import mlx.core as mx
import numpy as np
import pytest
from checkpoints import add_tokenizer
from families import FAMILIES, build_model, load_resident, save_checkpoint
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler
from scripted import VOCABULARY, ScriptedModel, Words

from flashmoe import FlashMoEModel, OptionError, PromptError
from flashmoe.generation.prompt import encode_prompt
from flashmoe.generation.session import Piece, Sampling, Session
from flashmoe.streaming.telemetry import Stats

# Families by how their caches forget: by trimming, or only by starting anew.
TRIMMED = {
    "qwen3_moe": {},
    "deepseek_v32": {},
    "gpt_oss": {"sliding_window": 64},
    "mistral4": {},
}
RESTARTED = {
    "gpt_oss": {},  # a window of 4 tokens, long since full
    "jamba": {},
    "lfm2_moe": {},
    "longcat_flash_ngram": {},
    "nemotron_h": {},
    "qwen3_next": {},
}


@pytest.fixture(scope="module")
def models():
    """Resident models by family, built once."""
    built = {}

    def get(family, **changes):
        key = (family, *sorted(changes.items()))
        if key not in built:
            built[key] = build_model({**FAMILIES[family], **changes}, seed=0)
        return built[key]

    return get


@pytest.fixture
def qwen(models):
    return models("qwen3_moe")


def session_of(model, *, context=512, chunk=5, stop=(), stats=None):
    stats = Stats() if stats is None else stats
    return Session(model, Words(stop), stats, context=context, chunk=chunk)


def tokens(pieces):
    return [piece.token for piece in pieces if piece.token is not None]


def answer(session, ids, count=6, **options):
    return tokens(session.stream(ids, max_new_tokens=count, **options))


def draw(seed, count):
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()


@pytest.fixture
def calls(monkeypatch):
    """`calls(model)` is a list that grows by the number of tokens of each forward pass."""

    def watch(model):
        fed = []
        original = type(model).__call__

        def counting(self, inputs, *args, **kwargs):
            fed.append(inputs.shape[1])
            return original(self, inputs, *args, **kwargs)

        monkeypatch.setattr(type(model), "__call__", counting)
        return fed

    return watch


# Turns.


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next", "llama4"])
def test_a_second_turn_feeds_only_what_is_new(models, family):
    model = models(family)
    stats = Stats()
    session = session_of(model, stats=stats)
    first = draw(1, 17)
    said = answer(session, first)
    assert stats.prompt_tokens == 17
    # The last token of an answer has been sampled but not fed.
    second = [*first, *said, *draw(2, 9)]
    expected = answer(session_of(model), second)
    assert answer(session, second) == expected
    assert stats.prompt_tokens == 17 + 9 + 1


@pytest.mark.parametrize("family", TRIMMED)
@pytest.mark.parametrize("kept", [1, 8, 16, 20])
def test_a_diverging_turn_is_trimmed(models, family, kept):
    model = models(family, **TRIMMED[family])
    stats = Stats()
    session = session_of(model, stats=stats)
    first = draw(1, 17)
    history = [*first, *answer(session, first)]
    fed = stats.prompt_tokens
    second = [*history[:kept], *[(history[kept] + 1) % VOCABULARY], *draw(3, 4)]
    expected = answer(session_of(model), second)
    assert answer(session, second) == expected
    assert stats.prompt_tokens - fed == 5


@pytest.mark.parametrize("family", RESTARTED)
def test_a_diverging_turn_starts_anew_where_caches_cannot_be_trimmed(models, family):
    model = models(family)
    stats = Stats()
    session = session_of(model, stats=stats)
    first = draw(1, 17)
    history = [*first, *answer(session, first)]
    fed = stats.prompt_tokens
    second = [*history[:9], (history[9] + 1) % VOCABULARY, *draw(3, 4)]
    expected = answer(session_of(model), second)
    assert answer(session, second) == expected
    assert stats.prompt_tokens - fed == 14


@pytest.mark.parametrize("kept", [3, 13, 14, 15, 18, 22])
def test_chunked_attention_forgets_what_it_has_dropped(models, kept):
    """llama4 attends within chunks of 8 tokens, and its cache drops what lies further back."""
    model = models("llama4")
    session = session_of(model)
    first = draw(1, 20)
    history = [*first, *answer(session, first, 4)]
    second = [*history[:kept], (history[kept] + 1) % VOCABULARY, *draw(3, 4)]
    expected = answer(session_of(model), second, 12)
    assert answer(session, second, 12) == expected


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_the_same_prompt_again(models, family):
    session = session_of(models(family))
    ids = draw(4, 12)
    answers = [answer(session, ids) for _ in range(3)]
    assert answers[1:] == answers[:-1]


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "gpt_oss"])
def test_a_prompt_that_is_a_prefix_of_what_was_fed(models, family):
    session = session_of(models(family))
    ids = draw(4, 12)
    answer(session, ids)
    assert answer(session, ids[:7]) == answer(session_of(models(family)), ids[:7])


def test_five_turns(models):
    for family in ("qwen3_moe", "qwen3_next"):
        model = models(family)
        session = session_of(model)
        history = []
        for turn in range(5):
            history += draw(10 + turn, 5)
            expected = answer(session_of(model, chunk=64), history, 4)
            assert answer(session, history, 4) == expected
            history += expected


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_the_chunk_size_does_not_change_the_answer(models, chunk):
    for family in ("qwen3_moe", "gpt_oss", "qwen3_next"):
        ids = draw(5, 15)
        expected = answer(session_of(models(family), chunk=5), ids)
        assert answer(session_of(models(family), chunk=chunk), ids) == expected


# Where answers end.


def test_a_stop_id_ends_the_answer(qwen):
    ids = draw(6, 9)
    free = answer(session_of(qwen), ids, 20)
    stop = free[5]
    at = free.index(stop)
    stats = Stats()
    pieces = list(session_of(qwen, stop=[stop, 999], stats=stats).stream(ids, max_new_tokens=20))
    assert tokens(pieces) == free[:at]
    assert pieces[-1] == Piece(".", None, "stop")
    assert stats.tokens == at + 1


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
def test_a_context_that_fills_up(qwen, calls, prompt, room):
    """The last token is never fed, so it needs no place."""
    ids = draw(7, prompt)
    fed = calls(qwen)
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


# Interrupting.


class After:
    """should_stop: false for the first `count` times it is asked."""

    def __init__(self, count):
        self.left = count

    def __call__(self):
        self.left -= 1
        return self.left < 0


def test_an_interrupt_between_prompt_chunks(qwen, calls):
    ids = draw(1, 23)
    expected = answer(session_of(qwen), ids)
    fed = calls(qwen)
    stats = Stats()
    session = session_of(qwen, stats=stats)
    pieces = list(session.stream(ids, should_stop=After(2)))
    assert pieces == [Piece(".", None, "interrupt")]
    assert fed == [5, 5]
    assert (stats.prompt_tokens, stats.tokens) == (10, 0)
    # What had been fed is kept.
    assert answer(session, ids) == expected
    assert fed[2:5] == [5, 5, 2]


def test_an_interrupt_between_tokens(qwen, calls):
    ids = draw(1, 9)
    expected = answer(session_of(qwen), ids, 10)
    fed = calls(qwen)
    session = session_of(qwen)
    pieces = []
    for piece in session.stream(ids, max_new_tokens=10, should_stop=lambda: len(pieces) == 4):
        pieces.append(piece)
    assert tokens(pieces) == expected[:4]
    assert pieces[-1] == Piece(".", None, "interrupt")
    assert fed == [5, 3, 1, 1, 1, 1]
    assert answer(session, ids, 10) == expected


def test_an_interrupt_before_anything(qwen, calls):
    fed = calls(qwen)
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
def test_an_error_inside_a_forward_pass(models, monkeypatch, family, error, failing):
    """Layers before the one that fails have consumed the tokens, the others have not."""
    model = models(family)
    ids = draw(1, 14)
    history = draw(2, 6)
    expected = answer(session_of(model), ids)
    after = answer(session_of(model), [*ids, *expected, *history])
    session = session_of(model)
    layer = model.layers[-1]
    healthy = After(failing)
    original = type(layer).__call__

    def breaking(self, *args, **kwargs):
        if self is layer and healthy():
            raise error("broken")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(layer), "__call__", breaking)
        for _ in range(2):
            with pytest.raises(error, match="broken"):
                answer(session, ids)
    assert answer(session, ids) == expected
    assert answer(session, [*ids, *expected, *history]) == after


# Work that is not done.


@pytest.mark.parametrize(
    ("prompt", "passes"), [(1, [1]), (2, [1, 1]), (6, [5, 1]), (13, [5, 5, 2, 1])]
)
@pytest.mark.parametrize("count", [1, 4])
def test_no_forward_pass_for_a_token_that_nobody_sees(qwen, calls, prompt, passes, count):
    fed = calls(qwen)
    assert len(answer(session_of(qwen), draw(3, prompt), count)) == count
    assert fed == passes + [1] * (count - 1)


def test_no_forward_pass_after_a_stop_id():
    model = ScriptedModel([5, 6, 7, 8], VOCABULARY)
    session = session_of(model, stop=[7])
    assert answer(session, [1], 100) == [5, 6]
    assert model.calls == 3


def test_the_lm_head_is_computed_for_the_last_token_only():
    """Logits of a chunk would be 64 times 100,000 float32 numbers, 25.6 MB."""
    model = build_model({**FAMILIES["qwen3_moe"], "vocab_size": 100_000}, 0)
    session = session_of(model, chunk=64)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    answer(session, draw(1, 129), 2)
    assert mx.get_peak_memory() - before < 8_000_000


def test_progress_of_a_prompt(qwen):
    seen = []
    session = session_of(qwen)
    ids = draw(1, 13)
    answer(session, ids, 1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 13), (5, 13), (10, 13), (13, 13)]
    seen.clear()
    answer(session, [*ids, *draw(2, 3)], 1, progress=lambda *call: seen.append(call))
    assert seen == [(0, 3), (3, 3)]


# Against mlx-lm.


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next"])
def test_greedy_tokens_are_those_of_mlx_lm(tmp_path, home, family):
    folder = tmp_path / "source"
    folder.mkdir()
    save_checkpoint(folder, family, dtype=mx.bfloat16)
    add_tokenizer(folder)
    stock = load_resident(folder)
    stock.set_dtype(mx.float32)
    ids = draw(1, 20)
    expected = [token for token, _ in generate_step(mx.array(ids), stock, max_tokens=24)]
    with FlashMoEModel.from_pretrained(folder, cache="min", dtype="float32") as model:
        assert tokens(model.stream(ids, 24)) == expected


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.8, seed=1),
        Sampling(1.5, top_p=0.7, seed=2),
        Sampling(1.5, top_k=5, seed=3),
        Sampling(2.0, min_p=0.2, seed=4),
        Sampling(1.2, top_p=0.9, top_k=20, min_p=0.05, seed=5),
    ],
    ids=str,
)
def test_sampling_is_that_of_mlx_lm(qwen, sampling):
    ids = draw(1, 5)
    sampler = make_sampler(
        sampling.temperature, sampling.top_p, sampling.min_p, top_k=sampling.top_k
    )
    mx.random.seed(sampling.seed)
    steps = generate_step(mx.array(ids), qwen, max_tokens=10, sampler=sampler)
    expected = [token for token, _ in steps]
    assert len(set(expected)) > 3
    session = session_of(qwen)
    assert answer(session, ids, 10, sampling=sampling) == expected
    assert answer(session, ids, 10, sampling=sampling) == expected


@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_limits_that_leave_one_token_are_greedy(qwen, limits):
    ids = draw(1, 5)
    greedy = answer(session_of(qwen), ids, 16)
    assert answer(session_of(qwen), ids, 16, sampling=Sampling(5.0, **limits)) == greedy


def test_a_top_k_beyond_the_vocabulary(qwen):
    wide = answer(session_of(qwen), [1, 2], 8, sampling=Sampling(1.0, top_k=10_000, seed=1))
    free = answer(session_of(qwen), [1, 2], 8, sampling=Sampling(1.0, seed=1))
    assert wide == free


def test_a_seed_counts_from_the_first_token(qwen):
    """Whatever draws random numbers between asking for a stream and reading it."""
    sampling = Sampling(2.0, seed=1)
    expected = answer(session_of(qwen), [1, 2], 8, sampling=sampling)
    stream = session_of(qwen).stream([1, 2], max_new_tokens=8, sampling=sampling)
    answer(session_of(qwen), [1, 2], 8, sampling=Sampling(2.0, seed=2))
    assert tokens(stream) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature .*-0.1"),
        ({"temperature": float("nan")}, "temperature .*nan"),
        ({"temperature": float("inf")}, "temperature .*inf"),
        ({"top_p": 0.0}, "top-p must be above 0 and at most 1, but is 0.0"),
        ({"top_p": 1.1}, "top-p must be above 0 and at most 1, but is 1.1"),
        ({"top_p": float("nan")}, "top-p .*nan"),
        ({"top_k": -1}, "top-k must not be negative, but is -1"),
        ({"min_p": -0.5}, "min-p must be from 0 to 1, but is -0.5"),
        ({"min_p": 1.5}, "min-p must be from 0 to 1, but is 1.5"),
        ({"min_p": float("nan")}, "min-p .*nan"),
        ({"seed": -1}, "seed .*-1"),
        ({"seed": 2**64}, "seed .*18446744073709551616"),
    ],
    ids=str,
)
def test_impossible_samplings(options, words):
    with pytest.raises(OptionError, match=words):
        Sampling(**options)


# Prompts.


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
    with pytest.raises(PromptError, match=words) as error:
        encode_prompt(tokenizer, prompt, **options)
    assert "\n" not in str(error.value)


def test_an_impossible_prompt_is_refused_before_the_first_piece(qwen):
    session = session_of(qwen)
    with pytest.raises(PromptError):
        session.stream([500])
    assert len(answer(session, [5], 2)) == 2
