import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import add_tokenizer, edit_config, save_speaking
from families import save_checkpoint
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from flashmoe import (
    FlashMoEError,
    FlashMoEModel,
    MemoryBudgetError,
    OptionError,
    ReadError,
    SourceError,
    StoreError,
    repack,
)
from flashmoe.demo import DEMO_FOLDER

HELLO = "Hello! Ask me what a word means."
CAPITAL = "What is the capital of the United States?"
BARN = "What is a barn?"
BARN_ANSWER = "An outlying farm building for storing grain or animal feed and housing farm animals."


@pytest.fixture(scope="module")
def demo(demo_store):
    """The demo model with every expert in its bank."""
    with FlashMoEModel.from_pretrained(demo_store, memory="4GB") as model:
        assert model.bank_bytes == sum(6 * [32]) * model.bank_bytes // sum(model.memory_plan.slots)
        yield model


@pytest.fixture
def small(demo_store):
    """The demo model with the smallest bank that works."""
    with FlashMoEModel.from_pretrained(demo_store, cache="min") as model:
        yield model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A float checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-moe"
    return save_speaking(folder, "qwen3_moe", bits=None)


def cached_stores(home):
    return sorted((home / ".cache" / "flashmoe").glob("*.flashmoe"))


def logits(model, ids):
    return np.array(model.model(mx.array([ids])))


def tokens(pieces):
    return [piece.token for piece in pieces if piece.token is not None]


# Where models come from.


def test_the_demo_is_what_none_means(home):
    calls = []
    with FlashMoEModel.from_pretrained(progress=lambda *call: calls.append(call)) as model:
        assert model.generate("Hello") == HELLO
        assert model.store.path == cached_stores(home)[0]
    assert calls[-1][0] == calls[-1][1] > 18_000_000
    calls.clear()
    with FlashMoEModel.from_pretrained(progress=lambda *call: calls.append(call)) as model:
        assert model.generate(CAPITAL) == "Washington."
    assert calls == []
    assert len(cached_stores(home)) == 1


def test_a_store(demo, demo_store):
    assert demo.store.path == demo_store
    assert demo.generate(BARN) == BARN_ANSWER


def test_a_checkpoint_folder(home, tiny):
    shutil.copytree(tiny, home / "model")
    with FlashMoEModel.from_pretrained("~/model") as model:
        assert [model.store.path] == cached_stores(home)
        assert model.store.path.name.startswith("model-")
        first = tokens(model.stream([1, 2, 3], 5))
    with FlashMoEModel.from_pretrained(home / "model") as model:
        assert tokens(model.stream([1, 2, 3], 5)) == first
    assert len(cached_stores(home)) == 1


def test_a_changed_checkpoint_is_repacked_again(home, tiny):
    shutil.copytree(tiny, home / "model")
    with FlashMoEModel.from_pretrained(home / "model"):
        pass
    edit_config(home / "model", eos_token_id=7)
    with FlashMoEModel.from_pretrained(home / "model") as model:
        assert model.tokenizer.eos_token_ids == {7}
    assert len(cached_stores(home)) == 2


def test_each_precision_is_cached_by_itself(home, tiny):
    packed = {}
    for options in ({"bits": 4}, {"bits": 8}, {"bits": 4, "group_size": 32}, {"bits": 4}):
        with FlashMoEModel.from_pretrained(tiny, **options) as model:
            layout = model.store.manifest.layers[0].layout
            q = layout.projections["up_proj"]
            packed[model.store.path] = (q.bits, q.group_size)
    assert sorted(packed.values()) == [(4, 32), (4, 64), (8, 64)]
    assert sorted(packed) == cached_stores(home)


@pytest.mark.parametrize("option", ["bits", "group_size", "resident_bits"])
def test_a_store_takes_no_precision(demo_store, option):
    with pytest.raises(OptionError, match="is a store"):
        FlashMoEModel.from_pretrained(demo_store, **{option: 32})


def test_a_hub_id(home, tiny, monkeypatch):
    asked = []
    snapshot = home / "models--owner--name" / "snapshots" / "0123abcd"
    shutil.copytree(tiny, snapshot)
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, revision=None, **_: asked.append((repo, revision)) or str(snapshot),
    )
    with FlashMoEModel.from_pretrained("owner/name", revision="main") as model:
        source = model.store.manifest.source
        assert (source.repo, source.revision) == ("owner/name", "0123abcd")
        assert model.store.path.name.startswith("owner--name-")
    assert asked[0] == ("owner/name", "main")


def test_a_hub_that_cannot_be_reached(home, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(SourceError) as error:
        FlashMoEModel.from_pretrained("owner/name")
    assert str(error.value) == "owner/name cannot be fetched from the Hub: no route to host"


def test_no_such_model(home):
    with pytest.raises(SourceError, match="/nowhere/at/all is neither"):
        FlashMoEModel.from_pretrained("/nowhere/at/all")


def test_a_first_use_that_failed_is_repeated(home, tiny, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StoreError):
            FlashMoEModel.from_pretrained(tiny)
    with FlashMoEModel.from_pretrained(tiny) as model:
        assert len(tokens(model.stream([1, 2, 3], 5))) == 5


# Prompts and pieces.


def test_text_messages_and_ids_say_the_same(demo):
    message = {"role": "user", "content": BARN}
    ids = demo.tokenizer.apply_chat_template([message], add_generation_prompt=True)
    answers = [demo.generate(prompt) for prompt in (BARN, [message], ids)]
    assert answers == [BARN_ANSWER] * 3


def test_text_without_the_template(demo):
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert demo.generate(text, template=False) == HELLO


def test_pieces_add_up_to_the_answer(demo):
    pieces = list(demo.stream(BARN))
    assert "".join(piece.text for piece in pieces) == BARN_ANSWER
    assert demo.tokenizer.decode(tokens(pieces)) == BARN_ANSWER
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert pieces[-1].token is None
    assert all(piece.token is not None for piece in pieces[:-1])


def test_pieces_come_as_they_are_generated(demo):
    before = demo.stats()
    stream = demo.stream(BARN)
    assert demo.stats().tokens == before.tokens
    assert next(stream).text == "An"
    assert demo.stats().tokens == before.tokens + 1
    stream.close()
    assert demo.generate("Hello") == HELLO


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
    one, two = demo.stream(BARN), demo.stream("Hello")
    texts = ["", ""]
    for _ in range(40):
        for i, stream in enumerate((one, two)):
            piece = next(stream, None)
            texts[i] += piece.text if piece else ""
    assert texts == [BARN_ANSWER, HELLO]


# What is counted.


def test_stats_of_a_cold_and_a_warm_bank(demo_store):
    with FlashMoEModel.from_pretrained(demo_store, memory="4GB") as model:
        (stride,) = {layer.layout.record.stride for layer in model.store.manifest.layers}
        ids = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": BARN}], add_generation_prompt=True
        )
        assert model.stats().hits == model.stats().misses == model.stats().tokens == 0
        pieces = list(model.stream(ids))
        cold = model.stats()
        assert cold.prompt_tokens == len(ids)
        assert cold.tokens == len(tokens(pieces)) + 1  # the end of the turn is sampled, too
        assert 0 < cold.misses <= 6 * 32
        assert cold.bytes_demanded == stride * (cold.hits + cold.misses)
        assert cold.bytes_read == stride * cold.misses
        assert cold.hit_rate == cold.hits / (cold.hits + cold.misses)
        assert cold.seconds.prefill > 0 < cold.seconds.decode

        list(model.stream(ids))
        warm = model.stats().since(cold)
        assert (warm.misses, warm.bytes_read, warm.hit_rate) == (0, 0, 1.0)
        assert warm.hits == cold.hits + cold.misses
        assert warm.bytes_demanded == cold.bytes_demanded
        assert (warm.prompt_tokens, warm.tokens) == (cold.prompt_tokens, cold.tokens)


def test_accesses_of_one_token(small):
    """Top-2 in each of 6 layers; the smallest bank keeps what the last token used."""
    model = small.model
    mx.eval(model(mx.array([[5]])))
    first = small.stats()
    assert (first.hits, first.misses) == (0, 12)
    mx.eval(model(mx.array([[5]])))
    assert (small.stats().since(first).hits, small.stats().since(first).misses) == (12, 0)


def test_stats_are_a_copy(demo):
    before = demo.stats()
    demo.generate("Hello", 1)
    assert demo.stats().tokens == before.tokens + 1
    assert demo.stats().seconds is not before.seconds


# The module underneath.


def test_logits_of_the_module(demo):
    ids = demo.tokenizer.encode("A distinctive odor")
    out = demo.model(mx.array(ids)[None])
    assert out.shape == (1, len(ids), 4096)
    assert out.dtype == mx.float32
    assert np.isfinite(np.array(out)).all()


def test_logits_are_the_same_at_every_bank_size(demo, demo_store):
    ids = demo.tokenizer.encode("What is the capital of the United States? Washington.")
    expected = logits(demo, ids)
    least = demo.memory_plan.least_bank_bytes
    for cache, at_most in (("min", least), ("2MB", 2_000_000), (3_000_000, 3_000_000)):
        with FlashMoEModel.from_pretrained(demo_store, cache=cache) as model:
            assert least <= model.bank_bytes <= at_most
            for _ in range(2):
                np.testing.assert_array_equal(logits(model, ids), expected)
            model.check_integrity()


@pytest.mark.parametrize("backwards", [False, True])
def test_lazy_passes_may_be_evaluated_late_and_in_any_order(small, backwards):
    """The slots that an unevaluated pass reads are not overwritten before it has run."""
    rng = np.random.default_rng(0)
    prompts = [mx.array(rng.integers(3, 4096, (1, n))) for n in (1, 1, 5, 1, 2, 9, 1)]
    expected = [np.array(small.model(prompt)) for prompt in prompts]
    lazy = [small.model(prompt) for prompt in prompts]
    pairs = list(zip(lazy, expected, strict=True))
    for out, wanted in reversed(pairs) if backwards else pairs:
        np.testing.assert_array_equal(np.array(out), wanted)
    small.check_integrity()


def test_a_lazy_pass_survives_a_generation(small):
    expected = np.array(small.model(mx.array([[7]])))
    lazy = small.model(mx.array([[7]]))
    assert small.generate("Hello") == HELLO
    np.testing.assert_array_equal(np.array(lazy), expected)


# Options.


def test_kernels_by_name(demo, demo_store):
    ids = demo.tokenizer.encode("Define scent.")
    with FlashMoEModel.from_pretrained(demo_store, kernel="reference", cache="min") as model:
        np.testing.assert_array_equal(logits(model, ids), logits(demo, ids))


def test_an_unknown_kernel(demo_store):
    with pytest.raises(OptionError, match=r"kernel must be one of .*'reference'.*, not 'magic'"):
        FlashMoEModel.from_pretrained(demo_store, kernel="magic")


def test_the_stored_dtype(demo, demo_store):
    ids = demo.tokenizer.encode("Define scent.")
    with FlashMoEModel.from_pretrained(demo_store, dtype="stored") as model:
        stored = dict(tree_flatten(model.model.parameters()))
        widened = dict(tree_flatten(demo.model.parameters()))
        assert stored.keys() == widened.keys()
        for name, array in stored.items():
            narrow = array.dtype == mx.bfloat16
            assert widened[name].dtype == (mx.float32 if narrow else array.dtype)
            assert mx.array_equal(array.astype(widened[name].dtype), widened[name]), name
        assert stored["model.norm.weight"].dtype == mx.bfloat16
        out = model.model(mx.array([ids]))
        assert out.dtype == mx.bfloat16
        stock, _ = load_model(DEMO_FOLDER)
        assert mx.array_equal(out, stock(mx.array([ids])))
        assert model.bank_bytes < demo.bank_bytes


def test_an_unknown_dtype(demo_store):
    with pytest.raises(OptionError, match="dtype must be auto, float32 or stored"):
        FlashMoEModel.from_pretrained(demo_store, dtype="float16")


@pytest.mark.parametrize("context", [0, -1, 2049])
def test_an_impossible_context(demo_store, context):
    with pytest.raises(OptionError, match=rf"context .*{context}"):
        FlashMoEModel.from_pretrained(demo_store, context=context)


def test_memory_that_is_too_small_says_what_is_enough(demo_store):
    with pytest.raises(MemoryBudgetError) as error:
        FlashMoEModel.from_pretrained(demo_store, memory="1MB")
    least = error.value.least_bytes
    assert "the least that fits is" in str(error.value)
    with FlashMoEModel.from_pretrained(demo_store, memory=least) as model:
        assert model.memory_plan.planned_bytes <= least
        assert model.generate("Hello") == HELLO


FRESH = """
import sys
from flashmoe import FlashMoEModel, MemoryBudgetError

try:
    with FlashMoEModel.from_pretrained(sys.argv[1], memory=sys.argv[2]) as model:
        print(model.generate("Hello"))
except MemoryBudgetError as error:
    print(str(error).split()[-1])
"""


def test_what_is_said_to_be_enough_is_so_in_a_new_process(demo_store):
    def fresh(memory):
        command = [sys.executable, "-c", FRESH, str(demo_store), memory]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert fresh(fresh("1MB")) == HELLO


def test_a_cache_that_is_too_small_says_what_is_enough(demo_store):
    with pytest.raises(MemoryBudgetError) as error:
        FlashMoEModel.from_pretrained(demo_store, cache=1000)
    least = error.value.least_bytes
    with pytest.raises(MemoryBudgetError):
        FlashMoEModel.from_pretrained(demo_store, cache=least - 1)
    with FlashMoEModel.from_pretrained(demo_store, cache=least) as model:
        assert model.bank_bytes == least
        assert model.generate("Hello") == HELLO


@pytest.mark.parametrize("option", ["memory", "cache"])
@pytest.mark.parametrize("size", ["lots", "-1GB", "", -5])
def test_sizes_that_are_none(demo_store, option, size):
    with pytest.raises(OptionError):
        FlashMoEModel.from_pretrained(demo_store, **{option: size})


def test_a_damaged_store(demo_store, tmp_path):
    store = shutil.copytree(demo_store, tmp_path / "store")
    os.truncate(store / "experts" / "layer-003.safetensors", 50_000)
    with pytest.raises(StoreError, match="layer-003"):
        FlashMoEModel.from_pretrained(store)


# Reads that fail.


class Faulty:
    """preadv that fails from its `first`-th call on, until it is `repaired`."""

    def __init__(self, first):
        self.left = first
        self.repaired = False

    def __call__(self, descriptor, buffers, offset):
        self.left -= 1
        if self.left < 0 and not self.repaired:
            # Half a record, then the error: what the slot holds is neither old nor new.
            os.preadv(descriptor, [buffers[0][:100]], offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)


@pytest.mark.parametrize("first", [0, 1, 30, 200])
def test_a_read_error_in_the_middle(small, first, monkeypatch):
    faulty = Faulty(first)
    monkeypatch.setattr(small._reader, "_preadv", faulty)
    session = small.session()
    with pytest.raises(ReadError) as error:
        list(session.stream(BARN))
    assert error.value.errno == errno.EIO
    assert error.value.path.startswith(str(small.store.path / "experts"))
    assert error.value.offset >= 16_384
    small.check_integrity()
    with pytest.raises(ReadError):
        list(session.stream(BARN))
    faulty.repaired = True
    assert "".join(piece.text for piece in session.stream(BARN)) == BARN_ANSWER
    assert small.generate("Hello") == HELLO
    small.check_integrity()


def test_a_file_that_shrinks(demo_store, tmp_path):
    store = shutil.copytree(demo_store, tmp_path / "store")
    path = store / "experts" / "layer-002.safetensors"
    content = path.read_bytes()
    with FlashMoEModel.from_pretrained(store, cache="min") as model:
        pieces = model.stream(BARN)
        assert next(pieces).text == "An"
        os.truncate(path, 40_000)
        with pytest.raises(ReadError) as error:
            list(pieces)
        assert (error.value.path, error.value.errno) == (str(path), None)
        with path.open("r+b") as file:
            file.write(content)
        assert model.generate(BARN) == BARN_ANSWER
        model.check_integrity()


def test_a_file_that_disappears_before_it_is_opened(demo_store, tmp_path):
    store = shutil.copytree(demo_store, tmp_path / "store")
    path = store / "experts" / "layer-005.safetensors"
    with FlashMoEModel.from_pretrained(store, cache="min") as model:
        path.rename(tmp_path / "away")
        with pytest.raises(ReadError) as error:
            model.generate("Hello")
        assert (error.value.path, error.value.errno) == (str(path), errno.ENOENT)
        (tmp_path / "away").rename(path)
        assert model.generate("Hello") == HELLO


# The end.


def test_closing(demo_store):
    before = len(list(Path("/dev/fd").iterdir()))
    model = FlashMoEModel.from_pretrained(demo_store)
    assert model.generate("Hello") == HELLO
    model.close()
    model.close()
    assert len(list(Path("/dev/fd").iterdir())) == before
    for use in (
        lambda: model.generate("Hello"),
        lambda: model.stream("Hello"),
        lambda: model.session(),
        lambda: model.model,
    ):
        with pytest.raises(FlashMoEError, match="closed"):
            use()
    assert model.stats().tokens > 0


def test_a_with_block_closes(demo_store):
    with FlashMoEModel.from_pretrained(demo_store) as model:
        assert model.generate("Hello", 1) == "Hello"
    with pytest.raises(FlashMoEError, match="closed"):
        model.generate("Hello")


def test_a_with_block_closes_after_an_error(demo_store):
    with (
        pytest.raises(ZeroDivisionError),
        FlashMoEModel.from_pretrained(demo_store) as model,
    ):
        raise ZeroDivisionError
    with pytest.raises(FlashMoEError, match="closed"):
        model.generate("Hello")


@pytest.mark.parametrize("cache", ["min", "1GB"])
def test_a_session_outlives_its_model_only_to_say_so(demo_store, cache):
    with FlashMoEModel.from_pretrained(demo_store, cache=cache) as model:
        session = model.session()
        list(session.stream("Hello"))
    with pytest.raises(FlashMoEError, match="closed"):
        list(session.stream("Hello"))


def test_closing_gives_memory_back(demo_store):
    def active_bytes():
        return mx.get_active_memory()

    before = active_bytes()
    with FlashMoEModel.from_pretrained(demo_store) as model:
        model.generate("Hello")
        assert active_bytes() - before > model.bank_bytes
    assert active_bytes() - before < 1_000_000


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "qwen3_5_moe", "deepseek_v3"])
def test_other_families(home, tmp_path, family):
    folder = tmp_path / family
    folder.mkdir()
    save_checkpoint(folder, family)
    add_tokenizer(folder)
    with FlashMoEModel.from_pretrained(folder) as model:
        expected = tokens(model.stream([3, 1, 4, 1, 5, 9], 8))
        assert len(expected) == 8
    with FlashMoEModel(repack(folder, tmp_path / "store"), cache="min") as model:
        assert tokens(model.stream([3, 1, 4, 1, 5, 9], 8)) == expected
        model.check_integrity()
