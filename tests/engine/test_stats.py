"""What a model counts: tokens, accesses of experts, bytes and seconds."""

import mlx.core as mx

from flashmoe import FlashMoEModel
from tests.support.answers import BARN, HELLO
from tests.support.sessions import tokens


def test_stats_of_a_cold_and_a_warm_bank(demo_store):
    with FlashMoEModel.from_pretrained(demo_store, memory="4GB") as model:
        (stride,) = {layer.layout.record.stride for layer in model.store.manifest.layers}
        ids = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": BARN}], add_generation_prompt=True
        )
        assert model.totals().hits == model.totals().misses == model.totals().generated_tokens == 0
        pieces = list(model.stream(ids))
        cold = model.totals()
        assert cold.prompt_tokens == len(ids)
        assert (
            cold.generated_tokens == len(tokens(pieces)) + 1
        )  # the end of the turn is sampled, too
        assert 0 < cold.misses <= 6 * 32
        assert cold.bytes_demanded == stride * (cold.hits + cold.misses)
        assert cold.bytes_read == stride * cold.misses
        assert cold.hit_rate == cold.hits / (cold.hits + cold.misses)
        assert cold.seconds.prefill > 0 < cold.seconds.decode

        list(model.stream(ids))
        warm = model.totals().since(cold)
        assert (warm.misses, warm.bytes_read, warm.hit_rate) == (0, 0, 1.0)
        assert warm.hits == cold.hits + cold.misses
        assert warm.bytes_demanded == cold.bytes_demanded
        assert (warm.prompt_tokens, warm.generated_tokens) == (
            cold.prompt_tokens,
            cold.generated_tokens,
        )


def test_accesses_of_one_token(small_demo):
    """Top-2 in each of 6 layers; the smallest bank keeps what the last token used."""
    model = small_demo.model
    mx.eval(model(mx.array([[5]])))
    first = small_demo.totals()
    assert (first.hits, first.misses) == (0, 12)
    mx.eval(model(mx.array([[5]])))
    second = small_demo.totals().since(first)
    assert (second.hits, second.misses) == (12, 0)


def test_stats_are_a_copy(demo):
    before = demo.totals()
    demo.generate(HELLO, 1)
    assert demo.totals().generated_tokens == before.generated_tokens + 1
    assert demo.totals().seconds is not before.seconds
