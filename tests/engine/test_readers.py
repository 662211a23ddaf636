"""The same logits from every reader, with and without the page cache."""

import json

import mlx.core as mx
import numpy as np
import pytest

from flashmoe import FlashMoEModel, OptionError
from flashmoe.engine import build
from flashmoe.io.files import uncached_problem
from flashmoe.io.mapped import MmapReader
from flashmoe.io.threads import ThreadReader
from tests.support.answers import BARN, BARN_ANSWER
from tests.support.commands import Run
from tests.support.reader_cases import POOLS
from tests.support.readers import FaultyReader
from tests.support.skips import require


def assert_same(demo, model):
    ids = demo.tokenizer.encode("A barn is a building for farm animals.")
    expected = np.array(demo.model(mx.array([ids])))
    np.testing.assert_array_equal(np.array(model.model(mx.array([ids]))), expected)
    assert model.totals().misses > 0
    model.check_integrity()


@pytest.fixture
def uncached_store(demo_store):
    path = next((demo_store / "experts").iterdir())
    require("uncached reads", uncached_problem(path) is None)
    return demo_store


@pytest.mark.parametrize("reader", ["auto", "pread", "mmap"])
def test_every_reader(demo, demo_store, reader):
    with FlashMoEModel.from_pretrained(demo_store, cache="min", reader=reader) as model:
        assert (model.reader, model.page_cache) == ({"auto": "pread"}.get(reader, reader), True)
        assert_same(demo, model)


@pytest.mark.parametrize("dtype", ["float32", "stored"])
@pytest.mark.parametrize("pool", POOLS)
def test_past_the_page_cache(demo, uncached_store, monkeypatch, pool, dtype):
    monkeypatch.setattr(
        build, "open_reader", lambda name, page_cache: POOLS[pool](4, page_cache=page_cache)
    )
    options = {"cache": "min", "dtype": dtype}
    with FlashMoEModel.from_pretrained(uncached_store, page_cache=False, **options) as model:
        assert not model.page_cache
        if dtype == "float32":
            assert_same(demo, model)
            return
        with FlashMoEModel.from_pretrained(uncached_store, reader="mmap", **options) as mapped:
            ids = mx.array([demo.tokenizer.encode(BARN)])
            assert mx.array_equal(model.model(ids), mapped.model(ids))


@pytest.mark.parametrize("inner", [*POOLS, "mmap"])
def test_disorder(demo, demo_store, monkeypatch, inner):
    kinds = {**POOLS, "mmap": MmapReader}
    monkeypatch.setattr(
        build, "open_reader", lambda name, page_cache: FaultyReader(kinds[inner](3), seed=5)
    )
    with FlashMoEModel.from_pretrained(demo_store, cache="min") as model:
        assert_same(demo, model)


def test_without_the_library(demo, demo_store, monkeypatch):
    ids = mx.array([demo.tokenizer.encode(BARN)])
    with FlashMoEModel.from_pretrained(demo_store, cache="min", kernel="reference") as model:
        expected = model.model(ids)
        mx.eval(expected)
    monkeypatch.setattr("flashmoe.native.available", lambda: "it was not built")
    with FlashMoEModel.from_pretrained(demo_store, cache="min") as model:
        assert type(model._running.readers[0]) is ThreadReader
        assert mx.array_equal(model.model(ids), expected)


def test_experts_that_do_not_fit_are_read_past_the_page_cache(uncached_store, monkeypatch):
    with FlashMoEModel.from_pretrained(uncached_store, cache="min") as model:
        plan = model.memory_plan
        streamed = model.store.manifest.streamed_bytes
        assert model.page_cache
    taken = plan.planned_bytes - plan.process_bytes
    for usable, cached in ((streamed + 2 * taken, True), (streamed + taken // 2, False)):
        monkeypatch.setattr(
            "flashmoe.base.machine.usable_memory_bytes", lambda usable=usable: usable
        )
        with FlashMoEModel.from_pretrained(uncached_store, cache="min") as model:
            assert model.page_cache is cached
        with FlashMoEModel.from_pretrained(uncached_store, cache="min", page_cache=True) as model:
            assert model.page_cache


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reader": "fast"}, "reader must be one of .*'pread'.*, not 'fast'"),
        ({"reader": "mmap", "page_cache": False}, "mmap always reads through the page cache"),
    ],
    ids=str,
)
def test_impossible_options(demo_store, options, words):
    with pytest.raises(OptionError, match=words):
        FlashMoEModel.from_pretrained(demo_store, **options)


def test_a_file_system_that_needs_the_page_cache(demo_store, monkeypatch):
    monkeypatch.setattr("flashmoe.engine.facts.uncached_problem", lambda path: "Invalid argument")
    with pytest.raises(OptionError, match="leave the page cache on, or move the store"):
        FlashMoEModel.from_pretrained(demo_store, page_cache=False)


@pytest.mark.parametrize(
    "options", [["--reader", "mmap"], ["--reader", "pread", "--page-cache"], ["--no-page-cache"]]
)
def test_the_command_line(run_cli: Run, uncached_store, options):
    result = run_cli("generate", uncached_store, "-p", BARN, "--cache", "min", *options)
    assert (result.code, result.out) == (0, f"{BARN_ANSWER}\n")


def test_info(run_cli: Run):
    found = json.loads(run_cli("info", "--json").out)
    assert found["reader"] == "pread"
    assert [status["name"] for status in found["readers"]] == ["pread", "mmap"]
    shown = run_cli("info").out
    for status in found["readers"]:
        assert status["available"]
        assert f"{status['name']:<11} {status['note']}" in shown
