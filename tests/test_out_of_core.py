"""The measuring script: a run in a process of its own, with and without the native library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import out_of_core
import pytest
from checkpoints import save_speaking

from flashmoe import native
from flashmoe.bench import cgroup

SCRIPT = Path(out_of_core.__file__)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_speaking(tmp_path / "checkpoint", "qwen3_moe")


def run(monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    # The page cache belongs to everything else that runs here too.
    monkeypatch.setattr(out_of_core, "drop_page_cache", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--memory", "1GB", *map(str, options)])
    out_of_core.main()


def test_without_the_native_library(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "folder"
    options = ("--model", checkpoint, "--folder", folder, "--tokens", 5, "--json")
    for _ in range(2):  # the second time with the store that the first one made
        run(monkeypatch, *options, "--without-native", "--kernel", "cpu")
        (report,) = json.loads(capfd.readouterr().out)["runs"]
        assert (report["native"], report["kernel"]) == (False, "reference")
        assert report["tokens"] == 4
        assert report["tokens_per_second"] > 0
        assert 0.5 < report["hit_rate"] < 1
    assert [path.name for path in folder.iterdir()] == ["store"]
    assert checkpoint.is_dir()


@pytest.mark.skipif(native.available() is not None, reason="the native library is not built")
def test_compare(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run(monkeypatch, "--model", checkpoint, "--tokens", 3, "--kernel", "cpu", "--compare")
    output = capfd.readouterr().out
    assert "with the native library, kernel cpu: " in output
    assert "without it, kernel reference: " in output
    assert "times as fast" in output


@pytest.mark.skipif(native.available() is None, reason="the native library is built")
def test_a_library_that_is_not_there(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="flashmoe.native.build".replace(".", r"\.")):
        run(monkeypatch, "--model", checkpoint, "--tokens", 3)


def test_expected_failures_are_one_line(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--model", tmp_path / "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/nothing is neither")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not os.access(cgroup.V1, os.W_OK), reason="needs root and a memory cgroup")
def test_cgroup() -> None:
    with cgroup.memory_cgroup(64 * 2**20) as entrance:
        limit = entrance.with_name("memory.limit_in_bytes").read_text()
        assert int(limit) == 64 * 2**20
        enter = f"echo $$ > {entrance}; exec {sys.executable} -c 'b = bytearray(200 * 2**20)'"
        assert subprocess.run(["sh", "-c", enter], check=False).returncode == -9
    assert not entrance.parent.exists()


def test_no_cgroup_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "V1", tmp_path / "v1")
    monkeypatch.setattr(cgroup, "V2", tmp_path / "v2")
    with (
        pytest.raises(cgroup.CgroupError, match="Linux and root"),
        cgroup.memory_cgroup(2**30),
    ):
        pass


def test_a_prompt_beside_plain_reading(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(out_of_core, "SEQUENTIAL_SECONDS", 0.01)
    options = ["--model", checkpoint, "--folder", tmp_path / "folder", "--tokens", 3]
    with_or_without = [] if native.available() is None else ["--without-native"]
    run(monkeypatch, *options, *with_or_without)
    assert "of the" not in capfd.readouterr().out.splitlines()[-1]
    run(monkeypatch, *options, *with_or_without, "--sequential", "--json")
    (report,) = json.loads(capfd.readouterr().out)["runs"]
    assert report["sequential_bytes_per_second"] > 0
    assert report["prompt_bytes_per_second"] > 0
    share = report["prompt_bytes_per_second"] / report["sequential_bytes_per_second"]
    assert f" {share:.0%} of the " in out_of_core.sequential_share(report)
    decode_rate = report["tokens_per_second"]
    prompt_rate = report["prompt_tokens"] / report["prompt_seconds"]
    assert out_of_core.prompt_gain(report) == pytest.approx(prompt_rate / decode_rate)
