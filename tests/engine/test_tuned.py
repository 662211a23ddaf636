"""What a stored choice changes: how fast a model may be, and never what it says."""

import mlx.core as mx
import pytest

from flashmoe import FlashMoEModel
from flashmoe.engine import build, model_cache
from flashmoe.io.depth import Depth
from flashmoe.io.files import uncached_problem
from flashmoe.io.mapped import MmapReader
from flashmoe.io.select import ReadSettings, open_reader
from flashmoe.probe.record_files import cached_share, evict
from flashmoe.probe.tuning import Choice, Reads, Tuning, TuningFile
from flashmoe.store.reader import open_store
from tests.support.answers import BARN, BARN_ANSWER
from tests.support.commands import Run
from tests.support.skips import require

READS = Reads(ReadSettings("pread", Depth(3, 4096)), ReadSettings("pread", Depth(16, 10_000)))
ODD = Choice(cached=Reads(ReadSettings("mmap", Depth(2)), READS.prefill), uncached=READS)


@pytest.fixture
def record_paths(demo_store):
    paths = sorted((demo_store / "experts").iterdir())
    require("uncached reads", uncached_problem(paths[0]) is None)
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

    monkeypatch.setattr(build, "open_reader", note)
    return settings


def store_choice(demo_store, choice):
    file = TuningFile(model_cache.cache_folder(), open_store(demo_store))
    file.write(Tuning(choice, 1e9, "2026-01-02T03:04:05+00:00"))
    return file


def logits(model):
    ids = mx.array([model.tokenizer.encode("A barn is a building for farm animals.")])
    cache = None
    return model.model(ids, cache)


@pytest.mark.parametrize("page_cache", [True, False])
def test_results_are_the_same(home, demo, demo_store, record_paths, opened, page_cache):
    store_choice(demo_store, ODD)
    with FlashMoEModel.from_pretrained(demo_store, cache="min", page_cache=page_cache) as model:
        assert model.plan.reads == ODD.reads(model.page_cache)
        reads = ODD.reads(page_cache)
        # Another reader, or the same one at another depth.
        second = (reads.prefill, True) if page_cache else reads.prefill.depth
        assert opened == [(reads.decode, page_cache), second]
        assert (
            type(model._running.readers[0]) is MmapReader if page_cache else model.reader == "pread"
        )
        assert mx.array_equal(logits(model), logits(demo))
        assert model.generate(BARN) == BARN_ANSWER
        assert model._running.readers[-1].counters.bytes > 0
        assert model._running.readers[0].counters.bytes > 0


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
        assert model.plan.reads == Choice().reads(model.page_cache)
    assert opened == [(ReadSettings(), True)]


def test_damage_is_no_matter(home, demo_store):
    file = store_choice(demo_store, ODD)
    file.path.write_text("{")
    with FlashMoEModel.from_pretrained(demo_store, cache="min") as model:
        assert model.plan.reads == Choice().reads(model.page_cache)


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
        require("a page cache that can be emptied", not cached_share(record_paths))
        options = {"cache": "min", "page_cache": page_cache}
        with FlashMoEModel.from_pretrained(demo_store, **options) as model:
            for _ in range(3):
                model.generate(BARN)
            assert model.totals().bytes_read > model.store.manifest.streamed_bytes / 4
            held = cached_share(record_paths)
        # What opening a store reads, its header, is not of the records.
        assert held > 0.2 if page_cache else held < 0.05
