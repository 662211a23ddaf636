"""The measuring script: a run in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import save_speaking

SCRIPT = Path(__file__).parents[2] / "scripts" / "out_of_core.py"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_speaking(tmp_path / "checkpoint", "qwen3_moe")


def run(*options: object) -> str:
    """What the script prints; the page cache belongs to everything else that runs here too."""
    command = [sys.executable, SCRIPT, "--memory", "1GB", "--keep-page-cache", *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_store_made_here_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    options = ("--model", checkpoint, "--folder", folder, "--tokens", 5, "--json")
    for _ in range(2):  # the second time with the store that the first one made
        (report,) = json.loads(run(*options, "--kernel", "reference"))["runs"]
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


def test_a_prompt_beside_plain_reading(checkpoint: Path, tmp_path: Path) -> None:
    options = ["--model", checkpoint, "--folder", tmp_path / "folder", "--tokens", 3]
    assert "that the files give in order" not in run(*options)
    options += ["--sequential", "--sequential-seconds", "0.01"]
    assert "that the files give in order" in run(*options)
    (report,) = json.loads(run(*options, "--json"))["runs"]
    assert report["sequential_bytes_per_second"] > 0
    assert report["prompt_bytes_per_second"] > 0
