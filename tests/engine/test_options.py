"""Options that are refused, and the memory and cache that are said to be enough."""

import subprocess
import sys

import mlx.core as mx
import pytest

from flashmoe import FlashMoEModel, MemoryBudgetError, OptionError
from tests.support.answers import HELLO, HELLO_ANSWER

FRESH = """
import sys
from flashmoe import FlashMoEModel, MemoryBudgetError

try:
    with FlashMoEModel.from_pretrained(sys.argv[1], memory=sys.argv[2], share=True) as model:
        print(model.generate("Hello"))
except MemoryBudgetError as error:
    print(str(error).split()[-1])
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel": "magic"}, "kernel must be one of .*'reference'.*, not 'magic'"),
        ({"dtype": "float16"}, "dtype must be auto, float32 or stored"),
        ({"context": 0}, "context .*0"),
        ({"context": -1}, "context .*-1"),
        ({"context": 2049}, "context .*2049"),
        ({"prefill_chunk": 0}, "prefill chunk .*0"),
    ],
    ids=str,
)
def test_impossible_options(demo_store, options, words):
    with pytest.raises(OptionError, match=words):
        FlashMoEModel.from_pretrained(demo_store, **options)


@pytest.mark.parametrize("option", ["memory", "cache"])
@pytest.mark.parametrize("size", ["lots", "-1GB", "", -5])
def test_sizes_that_are_no_sizes(demo_store, option, size):
    with pytest.raises(OptionError):
        FlashMoEModel.from_pretrained(demo_store, **{option: size})


def test_memory_that_is_too_small_says_what_is_enough(demo_store):
    with pytest.raises(MemoryBudgetError) as error:
        FlashMoEModel.from_pretrained(demo_store, memory="1MB")
    least = error.value.least_bytes
    assert "the least that fits is" in str(error.value)
    with FlashMoEModel.from_pretrained(demo_store, memory=least) as model:
        assert model.memory_plan.planned_bytes <= least
        assert model.generate(HELLO) == HELLO_ANSWER


def test_what_is_said_to_be_enough_is_so_in_a_new_process(demo_store):
    def fresh(memory):
        command = [sys.executable, "-c", FRESH, str(demo_store), memory]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert fresh(fresh("1MB")) == HELLO_ANSWER


def test_a_cache_that_is_too_small_says_what_is_enough(demo_store):
    with pytest.raises(MemoryBudgetError) as error:
        FlashMoEModel.from_pretrained(demo_store, cache=1000)
    least = error.value.least_bytes
    with pytest.raises(MemoryBudgetError):
        FlashMoEModel.from_pretrained(demo_store, cache=least - 1)
    with FlashMoEModel.from_pretrained(demo_store, cache=least) as model:
        assert model.bank_bytes == least
        assert model.generate(HELLO) == HELLO_ANSWER


def test_a_prefill_chunk_for_which_there_is_no_room(demo_store):
    with pytest.raises(MemoryBudgetError) as error:
        FlashMoEModel.from_pretrained(demo_store, memory="1MB", prefill_chunk=2048)
    least = error.value.least_bytes
    assert "or take a prefill chunk of fewer tokens than 2048" in str(error.value)
    with FlashMoEModel.from_pretrained(demo_store, memory=least, prefill_chunk=2048) as model:
        assert model.memory_plan.prompts.chunk_tokens == 2048
        assert model.generate(HELLO) == HELLO_ANSWER
    with pytest.raises(MemoryBudgetError) as error:
        FlashMoEModel.from_pretrained(demo_store, cache=1000, prefill_chunk=2048)
    assert "prefill" not in str(error.value)


def test_the_prefill_chunk_decides_how_prompts_are_fed(demo_store):
    """And with it their rounding, whatever the memory."""
    ids = [7 * n % 500 for n in range(50)]
    found = {}
    for chunk in (16, 50):
        for options in ({"cache": "min"}, {"memory": "2GB"}):
            with FlashMoEModel.from_pretrained(demo_store, prefill_chunk=chunk, **options) as model:
                assert model.memory_plan.prompts.chunk_tokens == chunk
                state = model.session()._state
                steps = []
                logits = state.feed(ids, lambda done, total, steps=steps: steps.append(done))
                assert {n for n in steps if n % chunk == 0} >= set(range(0, 49, chunk))
                found.setdefault(chunk, []).append(logits)
    for one, other in found.values():
        assert mx.array_equal(one, other)
    assert mx.allclose(found[16][0], found[50][0], atol=1e-3)
