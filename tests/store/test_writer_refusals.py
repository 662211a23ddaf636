"""What a writer refuses to write over, and other writers of the same store."""

import fcntl
import subprocess
import sys

import pytest

from flashmoe.base.errors import StoreError
from flashmoe.store.reader import is_store
from flashmoe.store.verify import verify
from flashmoe.store.writer import StoreWriter
from tests.support.stores import ONE_LAYER_FILES, RESIDENT_FILE, folder_content, write_one_layer

pytestmark = pytest.mark.usefixtures("fast_disk")
BUSY = "is being written by another process"


@pytest.fixture
def race(dest, monkeypatch):
    """Another writer finishes a store between our first look and our lock."""
    with StoreWriter(dest):
        pass
    flock = fcntl.flock

    def finish_first(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        write_one_layer(dest)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", finish_first)


def test_a_complete_store_without_force(dest, one_layer_files):
    write_one_layer(dest)
    with pytest.raises(StoreError, match="already holds a complete store; pass --force"):
        StoreWriter(dest)
    assert folder_content(dest) == one_layer_files[0]
    assert verify(dest).files == 3


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["holiday.jpg", ".hidden", "config.json", RESIDENT_FILE])
def test_a_folder_of_something_else(dest, name, force):
    dest.mkdir()
    (dest / name).write_bytes(b"mine")
    with pytest.raises(StoreError, match="is not empty and not a flashmoe store"):
        StoreWriter(dest, force=force)
    assert folder_content(dest) == {name: b"mine"}
    assert list(dest.iterdir()) == [dest / name]


@pytest.mark.parametrize("force", [False, True])
def test_a_file(dest, force):
    dest.write_bytes(b"mine")
    with pytest.raises(StoreError, match=r"dest\.flashmoe is a file"):
        StoreWriter(dest, force=force)
    assert dest.read_bytes() == b"mine"


@pytest.mark.parametrize("force", [False, True])
def test_a_second_writer(dest, force):
    with StoreWriter(dest), pytest.raises(StoreError, match=BUSY):
        StoreWriter(dest, force=force)
    with StoreWriter(dest):
        pass


def test_a_writer_in_another_process(dest):
    with StoreWriter(dest):
        pass
    script = (
        "import fcntl, sys; lock = open(sys.argv[1]); fcntl.flock(lock, fcntl.LOCK_EX);"
        "print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-S", "-c", script, str(dest / "repack.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(StoreError, match=BUSY):
            StoreWriter(dest)
        other.stdin.close()
    write_one_layer(dest)
    assert verify(dest).files == 3


def test_a_store_that_was_just_finished_is_not_deleted(race, dest, one_layer_files):
    with pytest.raises(StoreError), StoreWriter(dest):
        pass
    assert is_store(dest)
    assert {name: folder_content(dest)[name] for name in ONE_LAYER_FILES} == one_layer_files[0]


def test_a_writer_never_works_without_its_lock_file(race, dest):
    """The lock that it waited for went with the other writer's commit."""
    try:
        writer = StoreWriter(dest, force=True)
    except StoreError:
        assert is_store(dest)
        return
    with writer:
        assert (dest / "repack.lock").is_file()
        with pytest.raises(StoreError, match=BUSY):
            StoreWriter(dest)
