"""Which reader a name means, and whether the page cache is used."""

import contextlib
import errno
import os

import pytest

from flashmoe import native
from flashmoe.base.errors import OptionError, ReadError
from flashmoe.io import files, select
from flashmoe.io.mapped import MmapReader
from flashmoe.io.native import NativeReader
from flashmoe.io.select import (
    choose_page_cache,
    open_reader,
    reader_names,
    reader_statuses,
    resolve_reader,
)
from flashmoe.io.threads import ThreadReader


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(10_000))
    return path


def without_library(monkeypatch):
    monkeypatch.setattr(select.native, "available", lambda: "it was not built")


def test_names():
    assert reader_names() == ["auto", "pread", "mmap"]
    assert [status.name for status in reader_statuses()] == ["pread", "mmap"]
    assert resolve_reader() == resolve_reader("auto") == resolve_reader("pread") == "pread"
    assert resolve_reader("mmap") == resolve_reader("mmap", page_cache=True) == "mmap"
    with pytest.raises(OptionError, match=r"one of \['auto', 'pread', 'mmap'\], not 'fast'"):
        resolve_reader("fast")
    with pytest.raises(OptionError, match="mmap always reads through the page cache"):
        resolve_reader("mmap", page_cache=False)


def test_what_is_opened():
    expected = NativeReader if native.available() is None else ThreadReader
    for name, kind in {"auto": expected, "pread": expected, "mmap": MmapReader}.items():
        with contextlib.closing(open_reader(name)) as reader:
            assert type(reader) is kind
    with pytest.raises(OptionError):
        open_reader("mmap", page_cache=False)


def test_without_the_library(monkeypatch):
    without_library(monkeypatch)
    with contextlib.closing(open_reader()) as reader:
        assert type(reader) is ThreadReader
    notes = {status.name: status.note for status in reader_statuses()}
    assert notes["pread"] == "8 Python threads, because it was not built"


class TestPageCache:
    def test_by_default_what_fits_is_cached(self):
        def chosen(reader, problem, free_bytes):
            return choose_page_cache(
                None, reader, problem, file_bytes=10_000, free_bytes=free_bytes
            )

        assert chosen("pread", None, 10_000)[0]
        assert not chosen("pread", None, 9_999)[0]
        assert not chosen("pread", None, -5)[0]
        on, reason = chosen("pread", "Invalid argument", 0)
        assert on and "Invalid argument" in reason
        assert chosen("mmap", None, 0) == (True, "memory maps need it")

    def test_as_the_user_says(self):
        sizes = {"file_bytes": 10_000, "free_bytes": 0}
        assert choose_page_cache(True, "auto", None, **sizes) == (True, "as asked")
        assert choose_page_cache(False, "auto", None, **sizes) == (False, "as asked")
        with pytest.raises(OptionError, match="mmap"):
            choose_page_cache(False, "mmap", None, **sizes)

    def test_a_file_system_that_needs_it(self):
        with pytest.raises(OptionError, match=r"Invalid argument.*leave the page cache on"):
            choose_page_cache(False, "pread", "Invalid argument", file_bytes=0, free_bytes=10_000)

    def test_what_a_file_system_says(self, path, monkeypatch):
        def refuse(path):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        with pytest.raises(ReadError, match="No such file"):
            files.uncached_problem(path.with_name("none"))
        monkeypatch.setattr(files, "_open_uncached", refuse)
        assert files.uncached_problem(path) == os.strerror(errno.EINVAL)
