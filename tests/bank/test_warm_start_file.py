"""Warm start: what is remembered, by whom, and what comes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashmoe import FlashMoEModel
from flashmoe.bank.warm_start_file import WarmStartFile
from flashmoe.store.reader import Store
from tests.support.answers import BARN, BARN_ANSWER, CAPITAL, CAPITAL_TOKENS
from tests.support.commands import Run
from tests.support.natives import compiled

SMALL = "4MB"


def remembered(home: Path) -> list[Path]:
    return sorted((home / ".cache/flashmoe/warm-start").glob("*"))


@pytest.fixture
def banks(tmp_path: Path, good_store: Store) -> WarmStartFile:
    return WarmStartFile(tmp_path / "kept", good_store)


def some(banks: WarmStartFile, start: int = 0) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(start, n)) for n in banks._n_records)


class TestFile:
    def test_what_is_written_is_read(self, banks: WarmStartFile) -> None:
        assert banks.read() is None
        banks.write(some(banks, 1))
        assert banks.read() == some(banks, 1)
        assert banks.path.stat().st_size < 1000
        assert [path.name for path in banks.path.parent.iterdir()] == [banks.path.name]

    def test_a_smaller_run_makes_nothing_forgotten(self, banks: WarmStartFile) -> None:
        banks.write([(3, 1, 0), (2, 1)])
        banks.write([(1, 2), ()])
        assert banks.read() == ((1, 2, 3, 0), (2, 1))

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: None,
            lambda content: [],
            lambda content: content | {"version": 2},
            lambda content: content | {"store": "0" * 64},
            lambda content: content | {"layers": content["layers"][:1]},
            lambda content: content | {"layers": [[0, 0], [1]]},
            lambda content: content | {"layers": [[-1], [1]]},
            lambda content: content | {"layers": [[99], [1]]},
            lambda content: content | {"layers": [[True], [1]]},
            lambda content: content | {"layers": [[1.0], [1]]},
            lambda content: content | {"layers": ["01", [1]]},
            lambda content: content | {"layers": {"0": [1], "1": [1]}},
            lambda content: content | {"more": 1},
            lambda content: {"layers": content["layers"]},
        ],
    )
    def test_anything_else_is_ignored_and_replaced(self, banks: WarmStartFile, damage: Any) -> None:
        banks.write(some(banks))
        banks.path.write_text(json.dumps(damage(json.loads(banks.path.read_text()))))
        assert banks.read() is None
        banks.write(some(banks, 1))
        assert banks.read() == some(banks, 1)

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"version": 1', b"[" * 100_000])
    def test_bytes_that_are_no_json_are_ignored(self, banks: WarmStartFile, content: bytes) -> None:
        banks.path.parent.mkdir()
        banks.path.write_bytes(content)
        assert banks.read() is None
        banks.write(some(banks))
        assert banks.read() == some(banks)

    def test_a_place_that_cannot_be_written_is_left_alone(
        self, tmp_path: Path, good_store: Store
    ) -> None:
        (tmp_path / "kept").write_text("a file")
        banks = WarmStartFile(tmp_path / "kept", good_store)
        banks.write(some(banks))
        assert banks.read() is None
        assert (tmp_path / "kept").read_text() == "a file"

    def test_stores_have_files_of_their_own(
        self, tmp_path: Path, banks: WarmStartFile, demo_store: Path
    ) -> None:
        with FlashMoEModel.from_pretrained(demo_store, cache="min") as model:
            other = WarmStartFile(tmp_path / "kept", model.store)
        assert other.path != banks.path


def answer(store: Path, **options: Any) -> Any:
    with FlashMoEModel.from_pretrained(store, **{"cache": SMALL, **options}) as model:
        assert model.generate(BARN) == BARN_ANSWER
        model.check_integrity()
        held = [set(bank.held()) for bank in model._running.streaming.banks]  # type: ignore[union-attr]
        return model.totals(), held


@compiled
class TestModel:
    def test_the_next_run_begins_with_what_was_there(self, home: Path, demo_store: Path) -> None:
        first, held = answer(demo_store, kernel="cpu", warm_start=True)
        (file,) = remembered(home)
        assert first.warm_started == 0
        layers = json.loads(file.read_text())["layers"]
        assert [set(experts) for experts in layers] == held
        second, _ = answer(demo_store, kernel="cpu", warm_start=True)
        assert 0 < second.warm_started_used <= second.warm_started
        assert remembered(home) == [file]

    def test_it_is_off_unless_asked_for(self, home: Path, demo_store: Path) -> None:
        answer(demo_store, warm_start=True)
        stats, _ = answer(demo_store)
        assert stats.warm_started == 0
        (file,) = remembered(home)
        file.unlink()
        answer(demo_store)
        assert remembered(home) == []

    def test_a_run_that_failed_or_did_nothing_is_not_remembered(
        self, home: Path, demo_store: Path
    ) -> None:
        with (
            pytest.raises(ZeroDivisionError),
            FlashMoEModel.from_pretrained(demo_store, warm_start=True) as model,
        ):
            model.generate(BARN, 2)
            raise ZeroDivisionError
        with FlashMoEModel.from_pretrained(demo_store, warm_start=True):
            pass
        assert remembered(home) == []

    def test_a_run_that_was_interrupted_is(self, home: Path, demo_store: Path) -> None:
        with (
            pytest.raises(KeyboardInterrupt),
            FlashMoEModel.from_pretrained(demo_store, warm_start=True) as model,
        ):
            model.generate(BARN, 2)
            raise KeyboardInterrupt
        assert len(remembered(home)) == 1

    def test_more_memory_takes_up_what_less_left(self, home: Path, demo_store: Path) -> None:
        answer(demo_store, kernel="cpu", warm_start=True, cache="1GB")
        (file,) = remembered(home)
        before = [set(experts) for experts in json.loads(file.read_text())["layers"]]
        answer(demo_store, kernel="cpu", warm_start=True, cache="min")
        after = [set(experts) for experts in json.loads(file.read_text())["layers"]]
        assert all(old <= new for old, new in zip(before, after, strict=True))


@compiled
def test_commands_start_warm_unless_told(home: Path, run_cli: Run, demo_store: Path) -> None:
    def stats(*options: str) -> Any:
        arguments = ("generate", demo_store, "-p", CAPITAL, "--cache", SMALL, "--json", *options)
        told = run_cli(*arguments).json()
        assert told["tokens"] == CAPITAL_TOKENS
        return told["stats"]

    assert stats("--no-warm-start")["warm_started"] == 0
    assert remembered(home) == []
    assert stats()["warm_started"] == 0
    second = stats()
    assert 0 < second["warm_started_used"] <= second["warm_started"]
    assert stats("--no-warm-start")["warm_started"] == 0
    (file,) = remembered(home)
    file.write_text("{")
    assert stats()["warm_started"] == 0
    line = run_cli("generate", demo_store, "-p", CAPITAL, "--cache", SMALL, "--stats").out
    assert "warm start: " in line


def test_a_chat_is_remembered(home: Path, run_cli: Run, demo_store: Path) -> None:
    talk = f"{BARN}\n/exit\n".encode()
    assert BARN_ANSWER in run_cli("chat", demo_store, "--cache", SMALL, stdin=talk).out
    assert len(remembered(home)) == 1
