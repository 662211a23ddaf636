"""The journal of an unfinished store, and hashes that are taken up again."""

from __future__ import annotations

import hashlib
import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flashmoe.native import checksum
from flashmoe.repacking import hashing
from flashmoe.repacking.digest import (
    NativeSha256,
    PlainSha256,
    Sha256,
    combine_crc32,
    crc32,
    sha256,
    take_up,
    update_two,
)
from flashmoe.repacking.hashing import Hashing
from flashmoe.repacking.journal import Journal, Reached, begun
from flashmoe.store.manifest import JOURNAL_NAME
from tests.support.skips import require

CONTENT = bytearray(random.Random(0).randbytes(100_000))


KINDS: dict[str, type[Sha256]] = {
    "native": NativeSha256,
    "plain": PlainSha256,
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What hashes, one after the other."""
    require("native SHA-256", request.param != "native" or checksum.available())
    if request.param != "native":
        monkeypatch.setattr(checksum, "available", lambda: False)
    return str(request.param)


@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 99_999, 100_000])
def test_a_hash_is_taken_up_again(kind: str, at: int) -> None:
    first = sha256()
    assert isinstance(first, KINDS[kind])
    first.update(memoryview(CONTENT)[:at])
    assert first.hexdigest() == first.hexdigest() == hashlib.sha256(CONTENT[:at]).hexdigest()
    state = first.state()
    assert (state is None) == (kind == "plain")
    second = take_up(state) if state is not None else first
    assert second is not None
    second.update(memoryview(CONTENT)[at:])
    assert second.hexdigest() == hashlib.sha256(CONTENT).hexdigest()


def test_a_state_of_what_is_not_here(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = sha256().state()
    monkeypatch.setattr(checksum, "available", lambda: False)
    assert state is None or take_up(state) is None


@pytest.mark.parametrize("sizes", [(0, 0), (5, 5), (64, 200), (70_000, 64), (99_000, 98_999)])
@pytest.mark.parametrize("before", [0, 13, 64])
def test_two_hashes_at_once(kind: str, sizes: tuple[int, int], before: int) -> None:
    """Each with bytes before it, so that neither begins at a block."""
    view = memoryview(CONTENT)
    first, second = sha256(), sha256()
    first.update(view[:before])
    second.update(view[: 2 * before])
    update_two(first, view[: sizes[0]], second, view[100_000 - sizes[1] :])
    assert (
        first.hexdigest() == hashlib.sha256(view[:before].tobytes() + view[: sizes[0]]).hexdigest()
    )
    tail = view[100_000 - sizes[1] :].tobytes()
    assert second.hexdigest() == hashlib.sha256(view[: 2 * before].tobytes() + tail).hexdigest()


def test_streams_hashed_beside_each_other(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashmoe.repacking.hashing.ALONE_BYTES", 1000)
    monkeypatch.setattr("flashmoe.repacking.hashing.READ_BYTES", 7000)
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    (tmp_path / "empty").touch()
    beside = Hashing()
    with ThreadPoolExecutor(2) as pool:
        files = [pool.submit(beside.hash_file, path) for _ in range(3)]
        empty = pool.submit(beside.hash_file, tmp_path / "empty")
        own = sha256()
        for begin in range(0, len(CONTENT), 9001):
            beside.submit(own, memoryview(CONTENT)[begin : begin + 9001]).result()
    beside.close()
    expected = hashlib.sha256(CONTENT).hexdigest()
    assert [file.result() for file in files] == [expected] * 3
    assert own.hexdigest() == expected
    assert empty.result() == hashlib.sha256().hexdigest()


def test_a_stream_waits_for_another(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together = []

    def counted(first: Sha256, content: memoryview, second: Sha256, other: memoryview) -> None:
        together.append((len(content), len(other)))
        update_two(first, content, second, other)

    monkeypatch.setattr(hashing, "update_two", counted)
    monkeypatch.setattr(hashing, "COMPANY_SECONDS", 1.0)
    both = Hashing()
    digests = [sha256(), sha256()]
    one = both.submit(digests[0], memoryview(CONTENT)[:70_000])
    other = both.submit(digests[1], memoryview(CONTENT))
    other.result()
    one.result()
    both.close()
    assert together == ([(70_000, 70_000)] if kind == "native" else [])
    assert digests[1].hexdigest() == hashlib.sha256(CONTENT).hexdigest()
    assert digests[0].hexdigest() == hashlib.sha256(CONTENT[:70_000]).hexdigest()


class Refusing(PlainSha256):
    def update(self, content: memoryview) -> None:
        raise TypeError("not writable")


def test_a_hash_that_fails_says_so_where_it_was_asked_for() -> None:
    beside = Hashing()
    with pytest.raises(TypeError, match="not writable"):
        beside.submit(Refusing(), memoryview(CONTENT)).result()
    fine = sha256()
    beside.submit(fine, memoryview(CONTENT)).result()
    beside.close()
    assert fine.hexdigest() == hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4111, 100_000])
def test_checksums(kind: str, size: int) -> None:
    for content in (memoryview(CONTENT)[:size], memoryview(bytes(CONTENT))[:size]):
        assert crc32(content) == zlib.crc32(content)


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
