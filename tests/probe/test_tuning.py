"""The file that a tuning is kept in: what is read back, and what counts as absent."""

import json
from dataclasses import replace

import pytest

from flashmoe.base import machine
from flashmoe.base.errors import OptionError
from flashmoe.io.depth import Depth
from flashmoe.io.select import ReadSettings
from flashmoe.probe.tuning import Choice, Reads, Tuning, TuningFile
from tests.support.disk import no_space

ODD = Choice(
    cached=Reads(ReadSettings("mmap", Depth(3, 4096)), ReadSettings("pread", Depth(16))),
    uncached=Reads(ReadSettings("pread", Depth(1, 2**20)), ReadSettings("auto", Depth(32, 5000))),
)
TUNINGS = [
    Tuning(ODD, 1.5e9, "2026-01-02T03:04:05+00:00"),
    Tuning(Choice(), 1e6, "2026-01-02T03:04:05+00:00"),
]


@pytest.fixture
def file(tmp_path, good_store):
    return TuningFile(tmp_path / "cache", good_store)


def changed(document, place, value):
    """A document with another value at a place such as "tuning.choice.cached"."""
    *parents, last = place.split(".")
    inner = document
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return document


@pytest.mark.parametrize("tuning", TUNINGS, ids=["odd", "default"])
def test_what_is_written_is_read(file, tuning):
    assert file.read() is None
    file.write(tuning)
    assert file.read() == tuning
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]
    file.write(TUNINGS[1])
    assert file.read() == TUNINGS[1]


def test_forgetting(file):
    assert not file.forget()
    file.write(TUNINGS[0])
    assert file.forget()
    assert file.read() is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"version": 1}'],
    ids=["empty", "cut off", "list", "null", "not UTF-8", "deep", "little"],
)
def test_damage_counts_as_absent(file, content):
    file.write(TUNINGS[0])
    file.path.write_bytes(content)
    assert file.read() is None
    file.write(TUNINGS[0])
    assert file.read() == TUNINGS[0]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("version", 1),
        ("version", 3),
        ("version", True),
        ("version", "2"),
        ("store", "0" * 64),
        ("machine.disk", "another"),
        ("machine.cores", 99),
        ("extra", 1),
        ("tuning.extra", 1),
        ("tuning.when", None),
        ("tuning.bytes_per_second", 0),
        ("tuning.bytes_per_second", "fast"),
        ("tuning.bytes_per_second", float("nan")),
        ("tuning.bytes_per_second", float("inf")),
        ("tuning.bytes_per_second", True),
        ("tuning.tokens_per_second", 1.0),
        ("tuning", None),
        ("tuning.choice.extra", 1),
        ("tuning.choice.cached", None),
        ("tuning.choice.cached.decode.reader", "fast"),
        ("tuning.choice.cached.decode.reader", 7),
        ("tuning.choice.cached.decode.depth.threads", 0),
        ("tuning.choice.cached.decode.depth.threads", 10**6),
        ("tuning.choice.cached.decode.depth.threads", 2.5),
        ("tuning.choice.cached.decode.depth.piece_bytes", 1),
        ("tuning.choice.cached.prefill.depth", [8, None]),
        ("tuning.choice.uncached.prefill.reader", "mmap"),
    ],
)
def test_what_is_not_understood_counts_as_absent(file, place, value):
    file.write(TUNINGS[0])
    document = json.loads(file.path.read_text())
    file.path.write_text(json.dumps(changed(document, place, value)))
    assert file.read() is None


def test_another_machine_has_another_file(file, tmp_path, good_store, monkeypatch):
    file.write(TUNINGS[0])
    here = machine.describe(good_store.path)
    for change in ({"disk": "another"}, {"processor": "another"}, {"memory_bytes": 1}):
        monkeypatch.setattr(machine, "describe", lambda path, c=change: replace(here, **c))
        other = TuningFile(tmp_path / "cache", good_store)
        assert other.path != file.path
        assert other.read() is None


def test_another_store_has_another_file(file, tmp_path, good_store, store_folder):
    # The same store, wherever it is on this disk.
    copy = replace(good_store, path=store_folder)
    assert TuningFile(tmp_path / "cache", copy).path == file.path
    manifest = store_folder / "flashmoe.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert TuningFile(tmp_path / "cache", copy).path != file.path


def test_a_full_disk_leaves_what_was_there(file, monkeypatch):
    file.write(TUNINGS[0])
    with monkeypatch.context() as patched:
        patched.setattr("json.dump", no_space)
        with pytest.raises(OSError, match="No space"):
            file.write(TUNINGS[1])
    assert file.read() == TUNINGS[0]
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]


def test_past_the_page_cache_is_not_for_memory_maps():
    with pytest.raises(OptionError, match="mmap"):
        Choice(uncached=Reads(ReadSettings("mmap"), ReadSettings()))


def test_this_machine_is_described(tmp_path):
    here = machine.describe(tmp_path)
    assert here == machine.describe(tmp_path)
    assert here.cores >= 1
    assert here.memory_bytes > 2**28
    assert all((here.system, here.processor, here.disk))
