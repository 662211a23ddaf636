"""Skips are told, and none goes by that need not be."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import skips

TESTS = Path(__file__).parents[1]
SCRIPT = TESTS.parent / "scripts" / "check_skips.py"
SKIPPING = """
import pytest

@pytest.mark.skipif(True, reason={0!r})
@pytest.mark.parametrize("i", range(2))
def test_marked(i):
    pass

def test_skipping():
    pytest.skip({0!r})

def test_running():
    pass
"""


def report_of(folder: Path, reason: str) -> Path:
    """What pytest reports of three tests skipped for this reason, and of one that is not."""
    test, report = folder / "test_it.py", folder / "report.xml"
    test.write_text(SKIPPING.format(reason))
    command = [sys.executable, "-m", "pytest", f"--junitxml={report}", test]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return report


def check_skips(report: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, SCRIPT, report], capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("installed", "reason", "status", "said"),
    [
        (False, "needs clang++", 0, "3 needs clang++\n"),
        (True, "needs clang++", 1, "3 needs clang++ -- error, it is here"),
        (False, "needs uncached reads", 0, "3 needs uncached reads\n"),
        (False, "it is late", 1, "3 it is late -- error, not one of NEEDS"),
        (False, "needs sleep", 1, "3 needs sleep -- error, not one of NEEDS"),
    ],
)
def test_what_skips_are_let_go_by(
    installed: bool,
    reason: str,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = report_of(tmp_path, reason)
    (tmp_path / "bin").mkdir()
    if installed:
        (tmp_path / "bin" / "clang++").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    code, out = check_skips(report)
    assert code == status
    assert out.startswith(f"{report}: 3 tests skipped\n")
    assert said in out


def test_no_report(tmp_path: Path) -> None:
    code, out = check_skips(tmp_path / "none.xml")
    assert code == 1
    assert "is not a report of pytest" in out


def test_tests_skip_for_known_needs_alone() -> None:
    with pytest.raises(KeyError):
        skips.needs("sleep")
    with pytest.raises(pytest.skip.Exception, match="needs files with holes"):
        skips.require("files with holes", False)
    skips.require("files with holes", True)


def test_every_skip_goes_by_one_door() -> None:
    own = {"skips.py", Path(__file__).name}
    files = [path for path in TESTS.rglob("*.py") if path.name not in own]
    skipping = re.compile(r"\bskip\(|skipif|skipIf|importorskip|SkipTest|xfail")
    assert [path.name for path in files if skipping.search(path.read_text())] == []
