"""The commands and Python of the README and docs/python.md run as they stand, in a folder of
their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = (ROOT / "docs" / "python.md").read_text()
MOST_WORDS = 900
NOT_RUN = "<!-- not run by the tests"
# Set-up and the targets that would run this test again; CI runs them by themselves.
SKIPPED_WORDS = ("make ", "pip install", "flashmoe chat\n")


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language, without those that the text marks as not run."""
    pattern = re.compile(rf"(?P<before>[^\n]*)\n```{language}\n(?P<code>.*?)```", re.DOTALL)
    return [m["code"] for m in pattern.finditer(text) if not m["before"].startswith(NOT_RUN)]


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


def run_python(code: str, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment(folder),
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_python(folder: Path) -> None:
    (code,) = blocks("python")
    printed = run_python(code, folder)
    assert "Washington." in printed
    assert "A distinctive odor that is pleasant." in printed


def test_the_examples_of_the_python_page(folder: Path) -> None:
    examples = blocks("python", PYTHON)
    assert len(examples) > 5
    printed = run_python("\n".join(examples), folder)
    assert "Washington." in printed
    assert "A distinctive odor that is pleasant." in printed
    assert printed.count("An outlying farm building") == 3
    assert "bytes verified" in printed
    assert "the least that fits is" in printed.splitlines()[-1]


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= MOST_WORDS


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        if "://" in target:
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("name", ["README.md", "docs/python.md", "docs/measured.md", "docs/log.md"])
def test_files_that_pages_name_exist(name: str) -> None:
    for paragraph in (ROOT / name).read_text().split("\n\n"):
        if "at commit be14799" in paragraph or "at an earlier commit" in paragraph:
            continue
        for path in re.findall(r"\b(?:scripts|tests)/[\w./]+", paragraph):
            assert (ROOT / path.rstrip(".")).exists(), f"{path}: say at which commit it was there"


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links to them, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
