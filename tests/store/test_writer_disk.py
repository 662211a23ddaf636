"""A disk that fills up at any call of a writer, and the order in which things reach the disk."""

import os
import shutil
from pathlib import Path

import pytest

from flashmoe.base.errors import StoreError
from flashmoe.store.reader import is_store, open_store
from flashmoe.store.verify import verify
from tests.support.disk import no_space, open_descriptors
from tests.support.stores import ONE_LAYER_FILES, folder_content, write_one_layer

pytestmark = pytest.mark.usefixtures("fast_disk")


def test_everything_is_on_disk_before_the_rename(dest, monkeypatch):
    events = []
    replace = Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.fstat(fd).st_ino))

    def rename(path, target):
        events.append("rename")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", rename)
    write_one_layer(dest)
    before = events[: events.index("rename")]
    assert {path.stat().st_ino for path in [dest, *dest.rglob("*")]} <= set(before)
    # The folder itself once more, so that the rename is on disk when the lock file goes.
    assert events[events.index("rename") + 1 :] == [dest.stat().st_ino]
    assert dest.stat().st_ino in before[-2:]


# What reaches the disk, by where it is looked up.
CALLS = [(os, "open"), (os, "write"), (os, "pwrite"), (os, "fsync"), (shutil, "copyfile")]
CALLS += [(Path, "mkdir"), (Path, "unlink"), (Path, "replace")]
# More than one run of `write_one_layer` makes.
MOST_CALLS = 50


class Crash:
    """Raises ENOSPC at the n-th of the calls and at all later ones, as a full disk does."""

    def __init__(self, monkeypatch, n):
        self.count = 0
        self.renamed = False
        for home, name in CALLS:
            self._wrap(monkeypatch, home, name, n)

    def _wrap(self, monkeypatch, home, name, n):
        real = getattr(home, name)

        def call(*args, **options):
            self.count += 1
            if self.count >= n:
                no_space()
            result = real(*args, **options)
            self.renamed = self.renamed or name == "replace"
            return result

        monkeypatch.setattr(home, name, call)


def crashing_run(dest, monkeypatch, n, seed):
    """One forced run on a disk that is full from the n-th call on."""
    with monkeypatch.context() as patch:
        crash = Crash(patch, n)
        try:
            write_one_layer(dest, seed, force=True)
        except (OSError, StoreError):
            assert crash.count >= n
        else:
            assert crash.count < n
    return crash


@pytest.mark.parametrize("n", range(1, MOST_CALLS))
def test_a_full_disk_at_every_call(dest, one_layer_files, monkeypatch, n):
    descriptors = open_descriptors()
    crash = crashing_run(dest, monkeypatch, n, 0)
    assert open_descriptors() <= descriptors
    assert is_store(dest) == crash.renamed
    if crash.renamed:
        assert open_store(dest).manifest.parameters == 12_345
    else:
        with pytest.raises(StoreError, match="is not a complete flashmoe store"):
            open_store(dest)
    # The next run may write.
    write_one_layer(dest, 1, force=True)
    assert folder_content(dest) == one_layer_files[1]


@pytest.mark.parametrize("n", range(1, MOST_CALLS))
def test_a_full_disk_at_every_call_of_a_replacement(dest, one_layer_files, monkeypatch, n):
    write_one_layer(dest, 0)
    crash = crashing_run(dest, monkeypatch, n, 1)
    if is_store(dest):
        # Either store whole, never a mixture.
        found = folder_content(dest)
        assert {name: found[name] for name in ONE_LAYER_FILES} == one_layer_files[crash.renamed]
        assert verify(dest).files == 3
    write_one_layer(dest, 1, force=True)
    assert folder_content(dest) == one_layer_files[1]


def test_no_call_is_left_out(dest, monkeypatch):
    with monkeypatch.context() as patch:
        crash = Crash(patch, 10**9)
        write_one_layer(dest)
        first = crash.count
        write_one_layer(dest, force=True)
        assert 20 < first < MOST_CALLS
        assert 20 < crash.count - first < MOST_CALLS
