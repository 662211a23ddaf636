"""Forward passes: none that nobody needs, no logits that nobody reads, and their progress."""

import mlx.core as mx
import pytest

from flashmoe import native
from tests.support.families import FAMILIES, build_model
from tests.support.natives import compiled
from tests.support.scripted import VOCABULARY, ScriptedModel
from tests.support.sessions import answer, draw, session_of, watch_passes


@pytest.mark.parametrize(
    ("prompt", "passes"), [(1, [1]), (2, [1, 1]), (6, [5, 1]), (13, [5, 5, 2, 1])]
)
@pytest.mark.parametrize("count", [1, 4])
def test_no_forward_pass_for_a_token_that_nobody_sees(qwen, monkeypatch, prompt, passes, count):
    fed = watch_passes(qwen, monkeypatch)
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


@compiled
def test_nor_by_native_kernels(demo, monkeypatch):
    rows = []
    matmul = native.matmul

    def counting(x, w, *args):
        if w.rows == len(demo.tokenizer):
            rows.append(len(x))
        return matmul(x, w, *args)

    monkeypatch.setattr(native, "matmul", counting)
    ids = draw(1, 300)
    list(demo.stream(ids, 3))
    assert rows == [1, 1, 1]


def test_progress_of_a_prompt(qwen):
    seen = []
    session = session_of(qwen)
    ids = draw(1, 13)
    answer(session, ids, 1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 13), (5, 13), (10, 13), (13, 13)]
    seen.clear()
    answer(session, [*ids, *draw(2, 3)], 1, progress=lambda *call: seen.append(call))
    assert seen == [(0, 3), (3, 3)]


def test_progress_by_layer(small_demo):
    """6 layers route; a chunk of 256 tokens, one of 40, and the last token."""
    seen = []
    list(small_demo.stream(draw(1, 297), 2, progress=lambda *call: seen.append(call)))
    assert {total for _, total in seen} == {297}
    done = [done for done, _ in seen]
    assert done == [0, 42, 85, 128, 170, 213, 256, 262, 269, 276, 282, 289, 297]
    assert small_demo._streaming().watch.done is None
