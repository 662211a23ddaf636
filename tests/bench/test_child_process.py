"""Running a function in a process of its own: what comes back, and every way that it may end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from flashmoe import FlashMoEError, OptionError
from flashmoe.bench import child_process
from flashmoe.bench.child_process import run_apart


def work(argument: dict[str, Any], progress: child_process.Share) -> dict[str, Any]:
    """What the processes of these tests do; what they print must not be in the way."""
    print("printed")
    progress(0.5)
    if argument.get("waits"):
        time.sleep(60)
    if "refuses" in argument:
        raise OptionError(argument["refuses"])
    if "fails" in argument:
        raise FlashMoEError(argument["fails"])
    if "misses" in argument:
        Path(argument["misses"]).read_bytes()
    if "breaks" in argument:
        raise MemoryError(argument["breaks"])
    return {"double": 2 * argument["number"]}


@pytest.fixture(autouse=True)
def found_by_children(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join([str(request.path.parent), *filter(None, sys.path)]))


def alive() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_results_and_progress() -> None:
    shares: list[float] = []
    found = run_apart(work, {"number": 4}, progress=shares.append)
    assert (found, shares) == ({"double": 8}, [0.5])


@pytest.mark.parametrize(
    ("argument", "kind", "said"),
    [
        ({"refuses": "no such kernel"}, OptionError, "^no such kernel$"),
        ({"fails": "no such store"}, FlashMoEError, "^no such store$"),
        ({"misses": "/nowhere/at/all"}, FlashMoEError, "^/nowhere/at/all: No such file"),
        ({"breaks": "too much"}, FlashMoEError, "ended with MemoryError: too much$"),
    ],
)
def test_what_goes_wrong_in_it(argument: dict[str, Any], kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        run_apart(work, argument)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed, as happens without memory"),
        ("raise SystemExit(7)", "ended with code 7"),
    ],
)
def test_one_that_dies(monkeypatch: pytest.MonkeyPatch, code: str, said: str) -> None:
    popen = subprocess.Popen

    def deadly(command: list[str], **options: Any) -> Any:
        return popen([sys.executable, "-c", code], **options)

    monkeypatch.setattr(child_process.subprocess, "Popen", deadly)
    with pytest.raises(FlashMoEError, match=said):
        run_apart(work, {"number": 1})


def test_an_interrupt_ends_it_too() -> None:
    def interrupt(share: float) -> None:
        assert alive()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_apart(work, {"waits": True}, progress=interrupt)
    assert alive() == []


def test_messages_are_lines_of_json() -> None:
    task = {"entrance": None, "function": [work.__module__, "work"], "argument": {"number": 1}}
    done = subprocess.run(
        [sys.executable, "-m", "flashmoe.bench.child_process"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=True,
    )
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    assert messages == [{"share": 0.5}, {"result": {"double": 2}}]
    assert done.stderr == "printed\n"
