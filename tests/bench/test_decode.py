"""`flashmoe bench decode` on the demo model: points, and what goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import psutil
import pytest

from flashmoe import FlashMoEError, OptionError, repack
from flashmoe.bench import decode, disk_rate
from flashmoe.bench.baselines import PlainThreads, Rival
from flashmoe.bench.cgroup import CgroupError
from flashmoe.bench.decode import Asked, DecodePoint, DecodeReport, bench_decode, point_of
from flashmoe.bench.decode_worker import Point, PointRun, run_in_child, run_point
from flashmoe.bench.pass_figures import PassFigures, pass_figures
from flashmoe.bench.prompts import PROMPTS
from flashmoe.engine import build
from flashmoe.engine.options import Options
from flashmoe.io.depth import Depth
from flashmoe.io.select import ReadSettings, open_reader
from flashmoe.probe import read_tuning
from flashmoe.probe.record_files import RecordFiles
from flashmoe.store.reader import open_store
from tests.support.checkpoints import save_speaking
from tests.support.commands import FLASHMOE, Run, assert_one_line

BRIEF = Asked(prompts=PROMPTS[:2], max_tokens=3)


def names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]


@pytest.fixture(autouse=True)
def brief_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding the fastest rival takes seconds, and has tests of its own."""

    def plain(files: RecordFiles, page_cache: bool, *_: object, **__: object) -> Any:
        rival: Rival = PlainThreads(2, files, page_cache)
        return rival, ["compared with plain reading"]

    monkeypatch.setattr(disk_rate, "find_rival", plain)
    monkeypatch.setattr(disk_rate, "SECONDS", 0.01)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """Points run in this process; the list has them."""
    points: list[Point] = []

    def run(point: Point, *, cgroup_bytes: int | None, progress: Any) -> PointRun:
        points.append(point)
        return run_point(point, progress)

    monkeypatch.setattr(decode, "run_in_child", run)
    return points


def test_points(demo_store: Path, here: list[Point]) -> None:
    said = []
    report = bench_decode(
        demo_store,
        [Options(cache="min"), Options(memory="2GB")],
        BRIEF,
        progress=lambda done, total: said.append((done, total)),
    )
    assert said == sorted(said) and said[-1] == (2000, 2000)
    small, large = report.points
    assert (small.memory_bytes, large.memory_bytes) == (None, 2 * 10**9)
    assert 0 < small.bank_share < large.bank_share == 1
    for point in report.points:
        assert [taken.name for taken in point.passes] == ["cold", "warm"]
        for taken in point.passes:
            assert taken.tokens == 4
            assert taken.compute_seconds is not None and taken.compute_seconds > 0
            assert sum(taken.phases.values()) == pytest.approx(taken.token_seconds, rel=0.05)
    assert small.passes[0].read_of_absent == 1
    assert large.passes[1].hit_rate == 1
    assert large.passes[1].overlap is None
    assert report.disk.slowest <= report.disk.bytes_per_second <= report.disk.fastest


def test_answers_go_round_until_enough_is_decoded(demo_store: Path) -> None:
    asked = Asked(prompts=("What is a barn?",), max_tokens=40)
    point = point_of(open_store(demo_store), Options(cache="min"), asked, ("cold",))
    (taken,) = run_point(point).passes
    assert len(taken.answers) > 1
    assert len(taken.token_seconds) >= 40
    assert len(taken.token_seconds) - max(map(len, taken.answers)) < 40
    # Greedy answers of a model that is exact at every bank size, whatever is in the bank.
    assert len({tuple(answer) for answer in taken.answers}) == 1


@pytest.mark.parametrize(("context", "measured"), [(64, True), (9, False)])
def test_computing_alone_where_caches_cannot_be_trimmed(
    tmp_path: Path, context: int, measured: bool
) -> None:
    save_speaking(tmp_path / "checkpoint", "qwen3_next")
    store = repack(tmp_path / "checkpoint", tmp_path / "hybrid.flashmoe")
    asked = Asked(prompts=("t1 t2 t3 t4",), max_tokens=6, template=False)
    options = Options(cache="min", context=context)
    (taken,) = run_point(point_of(store, options, asked, ("cold",))).passes
    assert len(taken.computing_seconds) == (2 * len(taken.answers) if measured else 0)
    assert all(seconds > 0 for seconds in taken.computing_seconds)
    figures = pass_figures(taken, 1e6)
    assert (figures.compute_seconds is not None) is measured
    assert (figures.overlap is not None) is measured


def test_points_run_with_what_tune_measured(
    run_cli: Run, demo_store: Path, here: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    three = ReadSettings("pread", Depth(threads=3))
    monkeypatch.setattr(read_tuning, "settings_for", lambda *_: [three])
    tuned = run_cli("tune", demo_store, "--seconds", 2, "--json").json()["tuning"]["choice"]
    assert tuned["cached"]["decode"] == asdict(three)
    opened = []

    def note(settings: ReadSettings, *, page_cache: bool) -> Any:
        opened.append(settings)
        return open_reader(settings, page_cache=page_cache)

    monkeypatch.setattr(build, "open_reader", note)
    command = ("bench", "decode", demo_store, "--cache", "5MB", "--max-tokens", 2)
    run_cli(*command)
    run_cli(*command, "--no-tuned")
    assert opened == [three, ReadSettings()]
    assert here[-1].prompts == PROMPTS


def test_json_of_points(run_cli: Run, demo_store: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is a barn?\n\n")
    report = run_cli(
        "bench", "decode", demo_store, "--cache", "min", "--memory", "1GB", "--max-tokens", 2,
        "--prompts", prompts, "--json",
    ).json()  # fmt: skip
    assert list(report) == names(DecodeReport)
    assert (report["prompts"], report["max_tokens"]) == (1, 2)
    for point in report["points"]:
        assert list(point) == names(DecodePoint)
        # A process of its own: without what the tests have in memory.
        assert 0 < point["peak_memory_bytes"] < 10**9
        assert [list(taken) for taken in point["passes"]] == [names(PassFigures)] * 2


def test_what_is_lossy_is_said(
    run_cli: Run, demo_store: Path, here: list[Point], tmp_path: Path
) -> None:
    brief = ("--cache", "min", "--max-tokens", 2, "--experts-per-token", 1)
    result = run_cli("bench", "decode", demo_store, *brief)
    assert result.code == 0
    assert "LOSSY: 1 of 2 experts per token" in result.out


def test_what_people_see(run_cli: Run, demo_store: Path, here: list[Point], tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    brief = ("--cache", "5MB", "--max-tokens", 2)
    result = run_cli("bench", "decode", demo_store, *brief, "--plot", plot)
    assert (result.code, result.err) == (0, "")
    for word in ("the disk gives", "cold", "warm", "overlap", "waiting", "host"):
        assert word in result.out
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--max-tokens", 1], 2, ["at least 2"]),
        (["--temp", -1], 2, ["temperature"]),
        (["--memory", "lots"], 2, ["'lots' is not a size"]),
        (["--cgroup", "lots"], 2, ["'lots' is not a size"]),
        (["--prompts", "nowhere.txt"], 1, ["nowhere.txt"]),
        (["--memory", "1MB"], 1, ["the least that fits is"]),
        (["--cache", "1kB"], 1, ["one token's needs"]),
        (["--context", 3], 1, ["prompt 1", "context"]),
    ],
    ids=str,
)
def test_what_cannot_be_measured(
    run_cli: Run, demo_store: Path, options: list[Any], code: int, words: list[str]
) -> None:
    assert_one_line(run_cli("bench", "decode", demo_store, *options), code, *words)


def test_a_file_without_prompts(run_cli: Run, demo_store: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    result = run_cli("bench", "decode", demo_store, "--prompts", tmp_path / "empty.txt")
    assert_one_line(result, 1, "has no prompts")


def point(folder: Path, **changes: Any) -> Point:
    made = point_of(open_store(folder), Options(cache="min"), BRIEF, ("cold",))
    return Point(**{**vars(made), **changes})


def run(asked: Point, cgroup_bytes: int | None = None) -> PointRun:
    return run_in_child(asked, cgroup_bytes=cgroup_bytes, progress=lambda share: None)


def test_what_a_child_says(demo_store: Path) -> None:
    with pytest.raises(OptionError, match="kernel must be one of"):
        run(point(demo_store, options={"kernel": "magic"}))
    with pytest.raises(FlashMoEError, match="nothing"):
        run(point(demo_store, store=str(demo_store / "nothing")))


def test_no_cgroup(demo_store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("flashmoe.bench.cgroup.V1", tmp_path / "v1")
    monkeypatch.setattr("flashmoe.bench.cgroup.V2", tmp_path / "v2")
    with pytest.raises(CgroupError, match="Linux and root"):
        run(point(demo_store), cgroup_bytes=2**30)


def test_an_interrupt_ends_the_child_too(demo_store: Path, home: Path) -> None:
    command = [FLASHMOE, "bench", "decode", demo_store, "--cache", "min", "--max-tokens", "2000"]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    children: list[psutil.Process] = []
    while not children and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
        children = [
            found
            for found in psutil.Process(process.pid).children()
            if "flashmoe.bench.child_process" in found.cmdline()
        ]
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "flashmoe: interrupted\n")
    assert children and not any(found.is_running() for found in children)
