"""One process per store: another is told by which, and nothing is left of one that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashmoe import FlashMoEModel, StoreInUseError
from flashmoe.store.claim import claim
from flashmoe.store.reader import Store, open_store
from tests.support.stores import tiny_store

HOLD = """
import sys
from pathlib import Path
from flashmoe.store.claim import claim
from flashmoe.store.reader import open_store
held = claim(open_store(sys.argv[1]), Path(sys.argv[2]), share=sys.argv[3] == "share")
print("held", flush=True)
sys.stdin.readline()
held.release()
print("released", flush=True)
sys.stdin.readline()
"""

Hold = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return tiny_store(tmp_path / "tiny.flashmoe")


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    return tmp_path / "home" / "locks"


@pytest.fixture
def hold(store: Store, locks: Path) -> Iterator[Hold]:
    """Starts a process that holds the store until a line is written to it."""
    started: list[subprocess.Popen[str]] = []

    def start(share: str = "alone") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(store.path), str(locks), share]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_second_process_is_told(store: Store, locks: Path, hold: Hold) -> None:
    first = hold()
    with pytest.raises(StoreInUseError) as caught:
        claim(store, locks)
    assert caught.value.pid == first.pid
    assert str(caught.value) == (
        f"{store.path} is in use by process {first.pid}; wait for it to end, or give --share "
        "(share=True in Python) to run both"
    )


def test_released(store: Store, locks: Path, hold: Hold) -> None:
    first = hold()
    assert first.stdin is not None and first.stdout is not None
    first.stdin.write("\n")
    first.stdin.flush()
    assert first.stdout.readline() == "released\n"
    claim(store, locks).release()


def test_a_process_that_was_killed_holds_nothing(store: Store, locks: Path, hold: Hold) -> None:
    first = hold()
    first.send_signal(signal.SIGKILL)
    first.wait()
    held = claim(store, locks)
    (left,) = locks.glob("*.lock")
    assert left.name.endswith(f".{os.getpid()}.lock")
    held.release()


def test_sharing(store: Store, locks: Path, hold: Hold) -> None:
    first = hold()
    shared = claim(store, locks, share=True)
    first.kill()
    first.wait()
    # The one that was let in keeps others out.
    command = [sys.executable, "-c", HOLD, str(store.path), str(locks), "alone"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"in use by process {os.getpid()}" in refused.stderr
    hold("share")
    shared.release()


def test_one_process_may_hold_it_twice(store: Store, locks: Path, hold: Hold) -> None:
    first, second = claim(store, locks), claim(store, locks)
    first.release()
    first.release()
    command = [sys.executable, "-c", HOLD, str(store.path), str(locks), "alone"]
    assert subprocess.run(command, capture_output=True, check=False, input=b"").returncode == 1
    second.release()
    hold()


def test_a_claim_that_is_forgotten(store: Store, locks: Path, hold: Hold) -> None:
    claim(store, locks)
    hold()


def test_by_any_path(store: Store, locks: Path, hold: Hold, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store.path)
    hold()
    with pytest.raises(StoreInUseError):
        claim(open_store(tmp_path / "link"), locks)


def test_other_stores_are_others(locks: Path, hold: Hold, tmp_path: Path) -> None:
    hold()
    claim(tiny_store(tmp_path / "other.flashmoe"), locks).release()


def test_where_no_lock_can_be_kept(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    claim(store, tmp_path / "file" / "locks").release()


def test_leftovers_go_and_nothing_else(store: Store, locks: Path, hold: Hold) -> None:
    first = hold()
    (locks / "1f-2e.77.lock").touch()
    (locks / "notes.lock").touch()
    claim(store, locks, share=True).release()
    names = sorted(path.name for path in locks.iterdir())
    pids = [name.split(".")[1] for name in names if name.count(".") == 2]
    assert sorted(pids) == sorted([str(first.pid), str(os.getpid())])
    assert {"door", "notes.lock"} <= set(names)


def test_a_model_holds_its_store(home: Path, demo_store: Path) -> None:
    code = "import sys; from flashmoe import FlashMoEModel; FlashMoEModel.from_pretrained({})"
    alone = [sys.executable, "-c", code.format(f"{str(demo_store)!r}, cache='min'")]
    shared = [sys.executable, "-c", code.format(f"{str(demo_store)!r}, cache='min', share=True")]
    with (
        FlashMoEModel.from_pretrained(demo_store, cache="min"),
        FlashMoEModel.from_pretrained(demo_store, cache="min"),
    ):
        refused = subprocess.run(alone, capture_output=True, text=True, check=False)
        assert f"in use by process {os.getpid()}" in refused.stderr
        assert subprocess.run(shared, capture_output=True, check=False).returncode == 0
    assert subprocess.run(alone, capture_output=True, check=False).returncode == 0


def test_a_model_that_cannot_be_loaded_holds_nothing(home: Path, demo_store: Path) -> None:
    code = "import sys; from flashmoe import FlashMoEModel; FlashMoEModel.from_pretrained({})"
    with pytest.raises(Exception, match="not enough"):
        FlashMoEModel.from_pretrained(demo_store, memory="1MB")
    alone = [sys.executable, "-c", code.format(f"{str(demo_store)!r}, cache='min'")]
    assert subprocess.run(alone, capture_output=True, check=False).returncode == 0
