"""docs/architecture.md names files that exist, in paragraphs that one can read."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
# Characters of a paragraph, about five lines.
LONGEST = 520
SUFFIXES = r"(?:py|cpp|md|sh|yml|metal)"


def named() -> list[str]:
    """Files in code spans: with a folder, or of one of the package's own names."""
    spans = re.findall(r"`([^`\n]+)`", PAGE)
    return sorted({s for s in spans if re.fullmatch(rf"[\w./-]+\.{SUFFIXES}", s)})


def test_files_are_named() -> None:
    assert len(named()) > 60


@pytest.mark.parametrize("name", named())
def test_the_file_exists(name: str) -> None:
    if "/" in name:
        assert any((ROOT / folder / name).exists() for folder in (".", "flashmoe"))
    else:
        assert any((ROOT / "flashmoe").rglob(name)) or any((ROOT / "tests").rglob(name))


def test_no_paragraph_is_long() -> None:
    lines = [line for line in PAGE.split("\n") if not line.startswith(("|", "    "))]
    assert [line for line in lines if len(line) > LONGEST] == []


def test_every_room_is_on_the_map() -> None:
    rooms = {path.parent.name for path in (ROOT / "flashmoe").glob("*/__init__.py")}
    assert [room for room in sorted(rooms - {"demo"}) if f"{room}/" not in PAGE] == []
