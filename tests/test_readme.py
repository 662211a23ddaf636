"""The README's commands and Python run as they stand, in a folder of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
NOT_RUN = "<!-- not run by the tests"
# Set-up and the targets that would run this test again; CI runs them by themselves.
SKIPPED_WORDS = ("make ", "pip install", "flashmoe chat\n")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, without those that the README marks as not run."""
    pattern = re.compile(rf"(?P<before>[^\n]*)\n```{language}\n(?P<code>.*?)```", re.DOTALL)
    return [m["code"] for m in pattern.finditer(README) if not m["before"].startswith(NOT_RUN)]


def shell_commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line and not f"{line}\n".startswith(SKIPPED_WORDS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "flashmoe").mkdir()
    (folder / "flashmoe" / "demo").symlink_to(ROOT / "flashmoe" / "demo")
    return folder


def environment(folder: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "HOME": str(folder), "PATH": path, "PYTHONSAFEPATH": "1"}


def test_every_command_is_shown() -> None:
    commands = {command.split()[1] for command in shell_commands()}
    assert commands >= {"repack", "inspect", "verify", "generate", "bench"}


def test_commands(folder: Path) -> None:
    outputs = []
    for command in shell_commands():
        result = subprocess.run(
            command,
            shell=True,
            cwd=folder,
            env=environment(folder),
            text=True,
            capture_output=True,
            timeout=120,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        outputs.append(result.stdout)
    everything = "".join(outputs)
    assert "An outlying farm building" in everything
    assert "Washington." in everything


def test_python(folder: Path) -> None:
    (code,) = blocks("python")
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment(folder),
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "Washington." in result.stdout
    assert "A distinctive odor that is pleasant." in result.stdout


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
