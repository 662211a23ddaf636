"""Fixtures that several test modules share; Hypothesis draws the same examples every time."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("seeded", derandomize=True, database=None, deadline=None)
settings.load_profile("seeded")

FLASHMOE = Path(sys.executable).with_name("flashmoe")


@dataclass(frozen=True)
class Result:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The one line of JSON that is all of stdout, from a command that worked."""
        assert (self.code, self.err) == (0, "")
        line, end, rest = self.out.partition("\n")
        assert (end, rest) == ("\n", "")
        return json.loads(line)


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled demo model as a store."""
    from flashmoe import repack
    from flashmoe.demo import DEMO_FOLDER

    return repack(DEMO_FOLDER, tmp_path_factory.mktemp("demo") / "demo.flashmoe").path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own, because ~/.cache/flashmoe is where stores are kept."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def run_cli(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """`run_cli(*args, stdin=b"")` runs the command line in this process, HOME being `home`."""
    from flashmoe.cli.main import main

    # pytest's own handlers would keep from stderr what a real run logs there.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def run(*args: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["flashmoe", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(stdin), encoding="utf-8"))
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        captured = capfd.readouterr()
        code = left.value.code
        return Result(code if isinstance(code, int) else -1, captured.out, captured.err)

    return run


@pytest.fixture
def run_process(home: Path) -> Callable[..., Result]:
    """`run_process(*args, stdin=b"", env={})` runs the installed command, HOME being `home`."""

    def run(*args: object, stdin: bytes = b"", env: dict[str, str] | None = None) -> Result:
        done = subprocess.run(
            [str(FLASHMOE), *map(str, args)],
            input=stdin,
            capture_output=True,
            env={**os.environ, "HOME": str(home), **(env or {})},
            timeout=60,
            check=False,
        )
        out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
        return Result(done.returncode, out, err)

    return run
