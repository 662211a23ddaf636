"""The journal of an unfinished store, and hashes that are taken up again."""

from __future__ import annotations

import hashlib
import random
import zlib
from pathlib import Path

import pytest

from flashmoe.repacking import digest
from flashmoe.repacking.digest import Sha256, combine_crc32
from flashmoe.repacking.journal import Journal, Reached, begun
from flashmoe.store.manifest import JOURNAL_NAME

CONTENT = bytearray(random.Random(0).randbytes(100_000))


@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 99_999, 100_000])
def test_a_hash_is_taken_up_again(at: int) -> None:
    first = Sha256()
    first.update(memoryview(CONTENT)[:at])
    state = first.state()
    assert state is not None
    second = Sha256(state)
    second.update(memoryview(CONTENT)[at:])
    assert second.hexdigest() == second.hexdigest() == hashlib.sha256(CONTENT).hexdigest()
    assert first.hexdigest() == hashlib.sha256(CONTENT[:at]).hexdigest()


def test_without_such_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_functions", lambda: None)
    plain = Sha256()
    plain.update(memoryview(CONTENT))
    assert plain.state() is None
    assert plain.hexdigest() == hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize("at", [0, 1, 5, 4096, 77_777, 100_000])
def test_checksums_combined(at: int) -> None:
    parts = zlib.crc32(CONTENT[:at]), zlib.crc32(CONTENT[at:])
    assert combine_crc32(*parts, len(CONTENT) - at) == zlib.crc32(CONTENT)


def test_lines_come_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.add({"plan": "x"})
    reached = Reached(3, 1, 500, b"\1\2", sources={"a": "aa"})
    journal.add(reached.entry(0, b"12345678"))
    reached.pieces = 4
    journal.add(reached.entry(1, b"abcd"))
    journal.close()
    assert begun(tmp_path) == {"plan": "x"}
    again = Journal(tmp_path)
    again.close()
    result = Reached()
    for entry in again.entries[1:]:
        result.apply(entry)
    # The second line took one CRC-32 back.
    reached.crcs = bytearray(b"1234abcd")
    assert result == reached


@pytest.mark.parametrize("lost_bytes", range(1, 40, 3))
def test_a_torn_line_is_none(tmp_path: Path, lost_bytes: int) -> None:
    journal = Journal(tmp_path)
    journal.add({"plan": "x"})
    journal.add({"a line of": "some length, longer than what is lost"})
    journal.close()
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(path.read_bytes()[:-lost_bytes])
    journal = Journal(tmp_path)
    assert journal.entries == [{"plan": "x"}]
    journal.add({"next": 1})
    journal.close()
    assert Journal(tmp_path).entries == [{"plan": "x"}, {"next": 1}]


def test_a_damaged_line_ends_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for n in range(3):
        journal.add({"n": n})
    journal.close()
    path = tmp_path / JOURNAL_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"1}", b"7}") + lines[2])
    assert Journal(tmp_path).entries == [{"n": 0}]
