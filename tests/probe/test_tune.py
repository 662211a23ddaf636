"""`flashmoe tune`: what is measured, in which time, what is kept and what is printed."""

import json
import os
import random
import signal
import subprocess
import time
from dataclasses import replace
from itertools import pairwise

import pytest

from flashmoe.base.errors import OptionError, StoreError
from flashmoe.engine.model_cache import cache_folder
from flashmoe.io.files import uncached_problem
from flashmoe.io.select import ReadSettings
from flashmoe.probe import read_tuning
from flashmoe.probe.read_tuning import decode_pattern, prefill_pattern, settings_for
from flashmoe.probe.record_files import ordered_batches, record_files
from flashmoe.probe.tune import tune
from flashmoe.probe.tuning import TuningFile
from flashmoe.store.reader import open_store
from tests.support.commands import FLASHMOE, Run, assert_one_line


class TestPatterns:
    def test_records_in_order(self, good_store):
        files = record_files(good_store)
        for size, batches in {1: 8, 2: 4, 3: 2, 4: 2}.items():
            found = list(ordered_batches(files, size, random.Random(0)))
            assert len(found) == batches
            assert len({place for batch in found for place in batch}) == batches * size
            for batch in found:
                assert len({path for path, _ in batch}) == 1
                offsets = [offset for _, offset in batch]
                steps = {b - a for a, b in pairwise(offsets)}
                assert steps <= {files.record.stride}

    def test_what_decode_and_prefills_ask_for(self, demo_store):
        store = open_store(demo_store)
        files = record_files(store)
        decode, prefill = decode_pattern(store, files), prefill_pattern(files)
        assert (decode.batch, decode.in_order, decode.apart) == (1, False, False)
        assert (prefill.batch, prefill.in_order, prefill.apart) == (16, True, False)

    @pytest.mark.parametrize("record_bytes", [16 * 1024, 300_000, 7 * 2**20, 3 * 2**30])
    @pytest.mark.parametrize("page_cache", [True, False])
    def test_settings(self, record_bytes, page_cache):
        settings = settings_for(record_bytes, page_cache)
        assert settings[0] == replace(ReadSettings(), reader="pread")
        assert len(set(settings)) == len(settings) <= 22
        assert any(s.reader == "mmap" for s in settings) is page_cache
        sizes = {s.depth.piece_bytes for s in settings} - {None}
        assert max(sizes) == min(record_bytes, 2**30)


class TestReads:
    def test_within_the_time(self, demo_store):
        ticks = []
        started = time.perf_counter()
        found = read_tuning.tune_reads(
            open_store(demo_store), 1.0, tick=lambda: ticks.append(time.perf_counter())
        )
        assert time.perf_counter() - started < 10
        assert len(ticks) >= 8
        modes = {row.page_cache for row in found.rows}
        assert modes == ({True} if found.uncached is None else {True, False})
        for mode in modes:
            for pattern in ("decode", "prefill"):
                rows = [r for r in found.rows if (r.page_cache, r.pattern) == (mode, pattern)]
                assert [row.is_default for row in rows] == [True] + [False] * (len(rows) - 1)
                assert sum(row.is_chosen for row in rows) == 1
                assert all(0 < r.slowest <= r.bytes_per_second <= r.fastest for r in rows)
                assert found.rate(mode, pattern) in [row.bytes_per_second for row in rows]

    def test_a_slow_disk_keeps_the_default(self, demo_store, monkeypatch):
        # A clock that a measurement takes a minute of.
        now = [0.0]

        def measure(*args, **options):
            now[0] += 60
            return read_for(0.01, *args[1:], **options)

        read_for = read_tuning.read_for
        monkeypatch.setattr(read_tuning, "read_for", measure)
        store = open_store(demo_store)
        found = read_tuning.tune_reads(store, 20.0, clock=lambda: now[0])
        assert all(row.is_default and row.is_chosen for row in found.rows)
        # Of each race the warm-up and one of the default.
        assert now[0] == 60 * 2 * len(found.rows)

    def test_the_fastest_is_chosen(self, demo_store, monkeypatch):
        class Rate:
            def __init__(self, rate):
                self.bytes_per_second = rate

        def measure(seconds, files, batch, opener, *args, **options):
            setting = opener.args[0]
            best = ("pread", 16 if batch == 1 else 4, None)
            depth = setting.depth
            return Rate(2e9 if (setting.reader, depth.threads, depth.piece_bytes) == best else 1e9)

        monkeypatch.setattr(read_tuning, "read_for", measure)
        found = read_tuning.tune_reads(open_store(demo_store), 0.5)
        assert found.cached.decode.depth.threads == 16
        assert found.cached.prefill.depth.threads == 4
        assert found.rate(True, "decode") == found.rate(True, "prefill") == 2e9


BRIEF = ("--seconds", "2")


def test_the_command_keeps_its_choice(run_cli: Run, demo_store):
    found = run_cli("tune", demo_store, *BRIEF, "--json").json()
    file = TuningFile(cache_folder(), open_store(demo_store))
    assert found["file"] == str(file.path)
    stored = file.read()
    assert (
        json.loads(json.dumps(found["tuning"]))
        == run_cli("tune", demo_store, "--show", "--json").json()
    )
    assert stored.bytes_per_second > 0
    shown = run_cli("tune", demo_store, "--show").out
    for part in ("decode, cached", "prefill, cached", "expected", "GB/s", stored.when):
        assert part in shown
    assert stored.when in run_cli("inspect", demo_store).out
    assert run_cli("inspect", demo_store, "--json").json()["tuned"] == found["tuning"]
    assert run_cli("tune", demo_store, "--forget").out == "forgotten\n"
    assert run_cli("tune", demo_store, "--forget").out == "nothing was stored\n"
    assert run_cli("tune", demo_store, "--forget", "--json").json() == {"forgotten": False}
    assert "nothing is stored" in run_cli("tune", demo_store, "--show").out
    assert run_cli("tune", demo_store, "--show", "--json").json() is None
    assert run_cli("inspect", demo_store, "--json").json()["tuned"] is None


def test_what_is_printed(run_cli: Run, demo_store):
    result = run_cli("tune", demo_store, *BRIEF)
    assert (result.code, result.err) == (0, "")
    for part in ("pattern", "GB/s", "default", "chosen", "expected", "tune --forget"):
        assert part in result.out
    uncached = uncached_problem(next((demo_store / "experts").iterdir())) is None
    assert ("decode, uncached" in result.out) or not uncached


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--seconds", "0"], 2, "1 to 3600 seconds, not 0"),
        (["--seconds", "nan"], 2, "1 to 3600 seconds, not nan"),
        (["--show", "--forget"], 2, "exclude"),
    ],
)
def test_impossible_options(run_cli: Run, demo_store, options, code, words):
    assert_one_line(run_cli("tune", demo_store, *options), code, words)


def test_what_is_no_store(run_cli: Run, tmp_path):
    assert_one_line(run_cli("tune", tmp_path), 1, "not a complete flashmoe store")
    with pytest.raises(StoreError):
        tune(tmp_path)


def test_seconds_are_bounded(demo_store):
    with pytest.raises(OptionError, match="not 4000"):
        tune(demo_store, seconds=4000)


def test_interrupted_nothing_is_kept(home, demo_store):
    command = [str(FLASHMOE), "tune", str(demo_store), "--seconds", "60"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    time.sleep(4)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert not list(home.rglob("*.json"))
