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
    def test_by_default_what_fits_is_cached(self, path):
        uncached = files.uncached_problem(path) is None
        assert choose_page_cache(None, "pread", path, 10_000, 10_000)
        assert choose_page_cache(None, "pread", path, 10_000, 9_999) is not uncached
        assert choose_page_cache(None, "pread", path, 10_000, -5) is not uncached
        assert choose_page_cache(None, "mmap", path, 10_000, 0)

    def test_as_the_user_says(self, path):
        assert choose_page_cache(True, "auto", path, 10_000, 0)
        with pytest.raises(OptionError, match="mmap"):
            choose_page_cache(False, "mmap", path, 0, 0)
        if files.uncached_problem(path) is None:
            assert not choose_page_cache(False, "auto", path, 0, 10_000)

    def test_a_file_system_that_needs_it(self, path, monkeypatch):
        def refuse(path):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        monkeypatch.setattr(files, "_open_uncached", refuse)
        assert choose_page_cache(None, "pread", path, 10_000, 0)
        with pytest.raises(OptionError, match="leave the page cache on") as caught:
            choose_page_cache(False, "pread", path, 0, 10_000)
        assert str(path) in str(caught.value)

    def test_a_file_that_is_not_there(self, path):
        with pytest.raises(ReadError, match="No such file"):
            choose_page_cache(False, "pread", path.with_name("none"), 0, 0)
