"""The measuring script: a run in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import out_of_core
import pytest

from tests.support.checkpoints import save_speaking

SCRIPT = Path(out_of_core.__file__)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_speaking(tmp_path / "checkpoint", "qwen3_moe")


def run(monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    # The page cache belongs to everything else that runs here too.
    monkeypatch.setattr(out_of_core, "drop_page_cache", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--memory", "1GB", *map(str, options)])
    out_of_core.main()


def test_a_store_made_here_is_kept(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "folder"
    options = ("--model", checkpoint, "--folder", folder, "--tokens", 5, "--json")
    for _ in range(2):  # the second time with the store that the first one made
        run(monkeypatch, *options, "--kernel", "reference")
        (report,) = json.loads(capfd.readouterr().out)["runs"]
        assert report["kernel"] == "reference"
        assert report["tokens"] == 4
        assert report["tokens_per_second"] > 0
        assert 0.5 < report["hit_rate"] < 1
    assert [path.name for path in folder.iterdir()] == ["store"]
    assert checkpoint.is_dir()


def test_expected_failures_are_one_line(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--model", tmp_path / "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/nothing is neither")
    assert done.stderr.count("\n") == 1


def test_a_prompt_beside_plain_reading(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(out_of_core, "SEQUENTIAL_SECONDS", 0.01)
    options = ["--model", checkpoint, "--folder", tmp_path / "folder", "--tokens", 3]
    run(monkeypatch, *options)
    assert "of the" not in capfd.readouterr().out.splitlines()[-1]
    run(monkeypatch, *options, "--sequential", "--json")
    (report,) = json.loads(capfd.readouterr().out)["runs"]
    assert report["sequential_bytes_per_second"] > 0
    assert report["prompt_bytes_per_second"] > 0
    share = report["prompt_bytes_per_second"] / report["sequential_bytes_per_second"]
    assert f" {share:.0%} of the " in out_of_core.sequential_share(report)
    decode_rate = report["tokens_per_second"]
    prompt_rate = report["prompt_tokens"] / report["prompt_seconds"]
    assert out_of_core.prompt_gain(report) == pytest.approx(prompt_rate / decode_rate)
