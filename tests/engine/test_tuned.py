"""What a stored choice changes: how fast a model may be, and never what it says."""

from dataclasses import replace

import mlx.core as mx
import pytest

from flashmoe import FlashMoEError, FlashMoEModel
from flashmoe.engine import api, model_cache
from flashmoe.io.depth import Depth
from flashmoe.io.files import uncached_problem
from flashmoe.io.mapped import MmapReader
from flashmoe.io.select import ReadSettings, open_reader
from flashmoe.probe.record_files import cached_share, evict
from flashmoe.probe.tuning import BankChoice, Choice, Reads, Tuning, TuningFile
from flashmoe.store.reader import open_store
from tests.support.answers import BARN, BARN_ANSWER
from tests.support.commands import Run

READS = Reads(ReadSettings("pread", Depth(3, 4096)), ReadSettings("pread", Depth(16, 10_000)))
ODD = Choice(cached=Reads(ReadSettings("mmap", Depth(2)), READS.prefill), uncached=READS)


@pytest.fixture
def record_paths(demo_store):
    paths = sorted((demo_store / "experts").iterdir())
    if uncached_problem(paths[0]) is not None:
        pytest.skip(f"{demo_store} is on a file system that needs the page cache")
    return paths


@pytest.fixture
def opened(monkeypatch):
    """The settings of every reader that is opened, in order, and through what; the depth of its
    lanes after it."""
    settings = []

    def note(wanted, *, page_cache):
        settings.append((wanted, page_cache))
        reader = open_reader(wanted, page_cache=page_cache)
        add = reader.lane

        def lane(depth):
            settings.append(depth)
            return add(depth)

        monkeypatch.setattr(reader, "lane", lane)
        return reader

    monkeypatch.setattr(api, "open_reader", note)
    return settings


def store_choice(demo_store, choice):
    file = TuningFile(model_cache.cache_folder(), open_store(demo_store))
    file.write(Tuning(choice, 1e9, None, "2026-01-02T03:04:05+00:00"))
    return file


def logits(model):
    ids = mx.array([model.tokenizer.encode("A barn is a building for farm animals.")])
    cache = None
    return model.model(ids, cache)


def with_bank(**changes):
    bank = BankChoice(bank_bytes=1, bank_share=1.0, page_cache=False, prefetch=False)
    return replace(ODD, bank=replace(bank, **changes))


@pytest.mark.parametrize("page_cache", [True, False])
def test_results_are_the_same(home, demo, demo_store, record_paths, opened, page_cache):
    store_choice(demo_store, ODD)
    with FlashMoEModel.from_pretrained(demo_store, cache="min", page_cache=page_cache) as model:
        assert model.choice == ODD
        reads = ODD.reads(page_cache)
        # Another reader, or the same one at another depth.
        second = (reads.prefill, True) if page_cache else reads.prefill.depth
        assert opened == [(reads.decode, page_cache), second]
        assert type(model._reader) is MmapReader if page_cache else model.reader == "pread"
        assert mx.array_equal(logits(model), logits(demo))
        assert model.generate(BARN) == BARN_ANSWER
        assert model._prefill_reader.counters.bytes > 0
        assert model._reader.counters.bytes > 0


@pytest.mark.parametrize("page_cache", [True, False])
def test_the_bank_is_smaller_and_prompts_are_fed_as_before(
    home, demo, demo_store, record_paths, page_cache
):
    with FlashMoEModel.from_pretrained(demo_store, memory="2GB") as model:
        before = model.memory_plan
    bank = {"bank_bytes": before.bank_bytes, "bank_share": 0.5, "page_cache": page_cache}
    store_choice(demo_store, with_bank(**bank))
    with FlashMoEModel.from_pretrained(demo_store, memory="2GB") as model:
        plan = model.memory_plan
        assert before.bank_bytes * 0.4 < plan.bank_bytes <= before.bank_bytes * 0.5
        assert plan.prompts == before.prompts
        assert model.page_cache is page_cache
        assert model.generate(BARN) == BARN_ANSWER
        assert mx.array_equal(logits(model), logits(demo))
        # Nor does it grow while it runs.
        model.generate([5] * 20, 40, template=False)
        assert model.bank_bytes == plan.bank_bytes
    # Whoever states a bank gets it.
    most = before.bank_bytes
    with FlashMoEModel.from_pretrained(demo_store, cache=most, page_cache=True) as model:
        assert model.bank_bytes == most
        assert model.page_cache


def test_a_choice_for_another_amount_of_memory_says_nothing_about_it(home, demo_store):
    store_choice(demo_store, with_bank(bank_bytes=1, bank_share=0.1))
    with FlashMoEModel.from_pretrained(demo_store, memory="2GB") as model:
        assert model.bank_bytes == model.memory_plan.most_bank_bytes
        assert model.page_cache


def test_what_the_user_says_comes_first(home, demo_store, record_paths, opened):
    store_choice(demo_store, ODD)
    options = {"cache": "min", "page_cache": True}
    with FlashMoEModel.from_pretrained(demo_store, reader="pread", **options) as model:
        assert model.reader == "pread"
    assert opened.pop(0) == (ReadSettings("pread"), True)
    assert opened.pop(0) == ODD.cached.prefill.depth
    with FlashMoEModel.from_pretrained(demo_store, reader="mmap", **options) as model:
        assert model.reader == "mmap"
    assert opened.pop(0) == (ODD.cached.decode, True)
    assert opened.pop(0) == ReadSettings("mmap").depth
    with FlashMoEModel.from_pretrained(demo_store, tuned=False, **options) as model:
        assert model.choice == Choice()
    assert opened == [(ReadSettings(), True)]


def test_memory_maps_stay_with_the_page_cache(home, demo_store, record_paths):
    with FlashMoEModel.from_pretrained(demo_store, cache="min") as model:
        bank_bytes = model.bank_bytes
    choice = with_bank(bank_bytes=bank_bytes)
    with FlashMoEModel.from_pretrained(demo_store, cache="min", tuned=choice) as model:
        assert not model.page_cache
    mapped = {"cache": "min", "tuned": choice, "reader": "mmap"}
    with FlashMoEModel.from_pretrained(demo_store, **mapped) as model:
        assert model.page_cache


def test_a_choice_that_cannot_be_had_is_none(home, demo_store, monkeypatch):
    with FlashMoEModel.from_pretrained(demo_store, cache="min") as model:
        bank_bytes = model.bank_bytes
    monkeypatch.setattr("flashmoe.engine.running.uncached_problem", lambda path: "Invalid argument")
    choice = with_bank(bank_bytes=bank_bytes)
    with FlashMoEModel.from_pretrained(demo_store, cache="min", tuned=choice) as model:
        assert model.page_cache


def test_damage_is_no_matter(home, demo_store):
    file = store_choice(demo_store, ODD)
    file.path.write_text("{")
    with FlashMoEModel.from_pretrained(demo_store, cache="min") as model:
        assert model.choice == Choice()


def test_another_choice_while_it_runs(home, demo, demo_store, record_paths):
    with FlashMoEModel.from_pretrained(demo_store, memory="2GB", tuned=Choice()) as model:
        whole = model.memory_plan.bank_bytes
        session = model.session()
        asked = {"max_new_tokens": 30, "template": False}
        expected = [piece.token for piece in session.stream(BARN, **asked)]
        half = with_bank(bank_bytes=whole, bank_share=0.5)
        found = []
        for number, piece in enumerate(model.session().stream(BARN, **asked)):
            found.append(piece.token)
            if number % 4 == 0:
                model.retune(half if number % 8 else Choice())
                model.check_integrity()
        assert found == expected
        before = model.read_counters
        model.retune(half)
        assert model.choice == half
        assert not model.page_cache
        assert whole * 0.4 < model.bank_bytes <= whole * 0.5
        assert mx.array_equal(logits(model), logits(demo))
        assert model._reader.counters.bytes + model._prefill_reader.counters.bytes > 0
        # It does not grow while it runs, until another choice says so.
        model.generate([5] * 20, 40, template=False)
        assert model.bank_bytes <= whole * 0.5
        model.retune(Choice())
        assert model.bank_bytes == whole
        assert model.page_cache
        assert model.read_counters.bytes == 0 < before.bytes
        assert mx.array_equal(logits(model), logits(demo))
    with pytest.raises(FlashMoEError, match="closed"):
        model.retune(half)


def test_the_command_line(run_cli: Run, demo_store, opened):
    store_choice(demo_store, ODD)
    command = ("generate", demo_store, "-p", BARN, "--cache", "min", "--page-cache")
    assert run_cli(*command).out == f"{BARN_ANSWER}\n"
    assert opened == [(ODD.cached.decode, True), (ODD.cached.prefill, True)]
    assert run_cli(*command, "--no-tuned").out == f"{BARN_ANSWER}\n"
    assert opened[2:] == [(ReadSettings(), True)]


def test_past_the_page_cache_nothing_is_kept_twice(home, demo_store, record_paths):
    """The operating system holds none of the records that a bank was read from."""
    for page_cache in (True, False):
        assert evict(record_paths)
        if cached_share(record_paths):
            pytest.skip("the page cache cannot be emptied here")
        options = {"cache": "min", "page_cache": page_cache}
        with FlashMoEModel.from_pretrained(demo_store, **options) as model:
            for _ in range(3):
                model.generate(BARN)
            assert model.stats().bytes_read > model.store.manifest.streamed_bytes / 4
            held = cached_share(record_paths)
        # What opening a store reads, its header, is not of the records.
        assert held > 0.2 if page_cache else held < 0.05
