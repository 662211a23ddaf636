"""Greedy and sampled tokens are those of mlx-lm, and a seed makes them repeatable."""

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

from flashmoe import FlashMoEModel, OptionError
from flashmoe.generation.session import Sampling
from tests.support.checkpoints import save_speaking
from tests.support.families import load_resident
from tests.support.sessions import answer, draw, session_of, tokens


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next"])
def test_greedy_tokens_are_those_of_mlx_lm(source, home, family):
    save_speaking(source, family, dtype=mx.bfloat16)
    stock = load_resident(source)
    stock.set_dtype(mx.float32)
    ids = draw(1, 20)
    expected = [token for token, _ in generate_step(mx.array(ids), stock, max_tokens=24)]
    with FlashMoEModel.from_pretrained(source, cache="min", dtype="float32") as model:
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
