"""What is said about installing works: the package index has no flashmoe of ours."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import flashmoe
from flashmoe.base.distribution import DISTRIBUTION, installed_version

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "pyproject.toml", "Makefile")]
TEXTS += [path for folder in ("docs", "metal") for path in (ROOT / folder).rglob("*.md")]
TEXTS += [
    path for path in (ROOT / "flashmoe").rglob("*") if path.suffix in (".py", ".md", ".cpp", ".h")
]
# A name to look up on the index, or extras of one.
FROM_THE_INDEX = re.compile(r"(install|uvx|pipx run)( -\S+)* ['\"]?flash-?moe|flashmoe(-mlx)?\[")


def test_the_name_is_the_one_in_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION
    assert list(project["scripts"]) == ["flashmoe"]


def test_the_version_is_that_of_the_installed_distribution() -> None:
    assert installed_version() == flashmoe.__version__ == version("flashmoe-mlx")


def test_no_text_sends_a_user_to_the_package_index() -> None:
    assert len(TEXTS) > 100
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in TEXTS
        for match in FROM_THE_INDEX.finditer(path.read_text())
    ]
    assert found == []


def test_what_counts_as_sending_a_user_there() -> None:
    for text in (
        "pip install flashmoe",
        "pip install -U flashmoe-mlx",
        "pip install 'flashmoe[plots]'",
        "uvx flashmoe chat",
        "flashmoe-mlx[plots]",
    ):
        assert FROM_THE_INDEX.search(text), text
    for text in ("pip install .", "pip install matplotlib", "flashmoe chat"):
        assert not FROM_THE_INDEX.search(text), text
