import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from stores import (
    RESIDENT_FILE,
    RESIDENT_TENSORS,
    SOURCE,
    layer_contents,
    layer_layout,
    resident_contents,
    write_tiny,
)

from flashmoe.errors import StoreError
from flashmoe.store.layout import TensorSpec
from flashmoe.store.manifest import Manifest
from flashmoe.store.reader import is_store, open_store
from flashmoe.store.verify import verify
from flashmoe.store.writer import StoreWriter, sha256_file

LAYER_FILE = "experts/layer-000.safetensors"
FILES = ["config.json", LAYER_FILE, "flashmoe.json", RESIDENT_FILE]


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """Syncing is what takes the time here; a closed descriptor is still an error."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tiny.flashmoe"


def content_of(folder):
    """Every file of a folder by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_one(folder, seed=0, *, force=False):
    write_tiny(folder, seed, n_layers=1, force=force)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The files of the stores with seeds 0 and 1."""
    root = tmp_path_factory.mktemp("expected")
    write_one(root / "0", 0)
    write_one(root / "1", 1)
    return content_of(root / "0"), content_of(root / "1")


def open_descriptors():
    return {path.name for path in Path("/dev/fd").iterdir()}


class TestRefusal:
    def test_a_complete_store_without_force(self, folder, expected):
        write_one(folder)
        with pytest.raises(StoreError, match="already holds a complete store; pass --force"):
            StoreWriter(folder)
        assert content_of(folder) == expected[0]
        assert verify(folder).files == 3

    @pytest.mark.parametrize("force", [False, True])
    @pytest.mark.parametrize("name", ["holiday.jpg", ".hidden", "config.json", RESIDENT_FILE])
    def test_a_folder_of_something_else(self, folder, name, force):
        folder.mkdir()
        (folder / name).write_bytes(b"mine")
        with pytest.raises(StoreError, match="is not empty and not a flashmoe store"):
            StoreWriter(folder, force=force)
        assert content_of(folder) == {name: b"mine"}
        assert list(folder.iterdir()) == [folder / name]

    @pytest.mark.parametrize("force", [False, True])
    def test_a_file(self, folder, force):
        folder.write_bytes(b"mine")
        with pytest.raises(StoreError, match=r"tiny\.flashmoe is a file"):
            StoreWriter(folder, force=force)
        assert folder.read_bytes() == b"mine"

    @pytest.mark.parametrize("force", [False, True])
    def test_a_second_writer(self, folder, force):
        with (
            StoreWriter(folder),
            pytest.raises(StoreError, match="is being written by another process"),
        ):
            StoreWriter(folder, force=force)
        with StoreWriter(folder):
            pass

    def test_a_writer_in_another_process(self, folder):
        with StoreWriter(folder):
            pass
        script = (
            "import fcntl, sys; lock = open(sys.argv[1]); fcntl.flock(lock, fcntl.LOCK_EX);"
            "print('locked', flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-S", "-c", script, str(folder / "repack.lock")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout.readline() == b"locked\n"
            with pytest.raises(StoreError, match="is being written by another process"):
                StoreWriter(folder)
            other.stdin.close()
        write_one(folder)
        assert verify(folder).files == 3


class TestRaces:
    """The other writer finishes between our first look and our lock."""

    def test_a_store_that_was_just_finished_is_not_deleted(self, folder, monkeypatch, expected):
        with StoreWriter(folder):
            pass
        flock = fcntl.flock

        def finish_first(descriptor, operation):
            monkeypatch.setattr(fcntl, "flock", flock)
            write_one(folder)
            flock(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", finish_first)
        with pytest.raises(StoreError), StoreWriter(folder):
            pass
        assert is_store(folder)
        assert {name: content_of(folder)[name] for name in FILES} == expected[0]

    def test_a_writer_never_works_without_its_lock_file(self, folder, monkeypatch):
        """The lock that it waited for went with the other writer's commit."""
        with StoreWriter(folder):
            pass
        flock = fcntl.flock

        def finish_first(descriptor, operation):
            monkeypatch.setattr(fcntl, "flock", flock)
            write_one(folder)
            flock(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", finish_first)
        try:
            writer = StoreWriter(folder, force=True)
        except StoreError:
            assert is_store(folder)
            return
        with writer:
            assert (folder / "repack.lock").is_file()
            with pytest.raises(StoreError, match="is being written by another process"):
                StoreWriter(folder)


class TestForce:
    def test_replaces(self, folder, expected):
        write_one(folder, 0)
        write_one(folder, 1, force=True)
        assert content_of(folder) == expected[1]
        assert verify(folder).files == 3

    def test_leaves_no_layer_of_the_old_store(self, folder, expected):
        write_tiny(folder, 0, n_layers=3)
        write_one(folder, 0, force=True)
        assert content_of(folder) == expected[0]

    def test_leaves_no_copied_file_of_the_old_store(self, folder, tmp_path):
        """A chat template of the old model would be the new model's."""
        template = tmp_path / "chat_template.jinja"
        template.write_bytes(b"old")
        with StoreWriter(folder) as writer:
            writer.commit(empty_manifest({template.name: writer.copy(template)}))
        write_one(folder, force=True)
        assert sorted(content_of(folder)) == FILES

    def test_works_on_nothing_and_on_the_incomplete(self, folder, expected):
        with StoreWriter(folder, force=True):
            pass
        write_one(folder, 0, force=True)
        assert content_of(folder) == expected[0]


def empty_manifest(copied):
    return Manifest("tiny", 0, SOURCE, {}, (), (), copied)


class TestLeaving:
    def test_without_commit(self, folder, expected):
        with StoreWriter(folder) as writer:
            writer.write_resident(RESIDENT_FILE, RESIDENT_TENSORS, resident_contents())
        assert not is_store(folder)
        with pytest.raises(StoreError, match="is not a complete flashmoe store"):
            open_store(folder)
        write_one(folder)
        assert content_of(folder) == expected[0]

    def test_by_an_error_in_the_middle(self, folder, expected):
        def contents():
            yield resident_contents()[0]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), StoreWriter(folder) as writer:
            writer.write_resident(RESIDENT_FILE, RESIDENT_TENSORS, contents())
        assert not is_store(folder)
        write_one(folder)
        assert content_of(folder) == expected[0]

    def test_a_forced_run_gives_the_old_store_up(self, folder):
        write_one(folder)
        with StoreWriter(folder, force=True):
            pass
        assert not is_store(folder)

    def test_copied_files_of_an_interrupted_run_go(self, folder, tmp_path):
        template = tmp_path / "chat_template.jinja"
        template.write_bytes(b"old")
        with StoreWriter(folder) as writer:
            writer.copy(template)
        write_one(folder)
        assert sorted(content_of(folder)) == FILES

    def test_the_lock_goes_with_the_commit(self, folder):
        with StoreWriter(folder):
            assert (folder / "repack.lock").is_file()
        assert (folder / "repack.lock").is_file()
        write_one(folder)
        assert not (folder / "repack.lock").exists()

    def test_the_manifest_comes_last(self, folder, tmp_path):
        layout = layer_layout()
        with StoreWriter(folder) as writer:
            layer = writer.layer(layout)
            for component in layout.record.components:
                layer.write(component, layer_contents(layout)[component.name])
                assert not is_store(folder)
            layer.finish()
            assert not is_store(folder)

    def test_parents_are_made(self, tmp_path):
        write_one_parent = tmp_path / "a"
        with StoreWriter(write_one_parent / "b" / "c.flashmoe"):
            pass
        assert (write_one_parent / "b" / "c.flashmoe" / "repack.lock").is_file()


class TestContents:
    def test_components_in_any_order(self, folder, expected):
        layout = layer_layout()
        contents = layer_contents(layout)
        with StoreWriter(folder) as writer:
            layer = writer.layer(layout)
            for component in reversed(layout.record.components):
                layer.write(component, contents[component.name])
            layer.finish()
        assert (folder / LAYER_FILE).read_bytes() == expected[0][LAYER_FILE]

    def test_any_buffer(self, folder):
        values = np.arange(12, dtype=np.float32).reshape(3, 4)
        tensor = TensorSpec("x", "F32", (3, 4))
        with StoreWriter(folder) as writer:
            for content in (values, memoryview(values), bytearray(values.tobytes())):
                shard = writer.write_resident(RESIDENT_FILE, [tensor], [content])
                assert (folder / RESIDENT_FILE).read_bytes()[16_384:] == values.tobytes()
                assert shard.sha256 == sha256_file(folder / RESIDENT_FILE)

    @pytest.mark.parametrize("extra", [-1, 1])
    def test_a_tensor_of_another_length(self, folder, extra):
        content = bytes(28 + extra)
        with StoreWriter(folder) as writer, pytest.raises(StoreError, match=r"norm\.weight has"):
            writer.write_resident(RESIDENT_FILE, [RESIDENT_TENSORS[1]], [content])

    @pytest.mark.parametrize("extra", [-1, 1])
    def test_a_component_of_another_length(self, folder, extra):
        layout = layer_layout(0)
        component = layout.record.components[2]
        with StoreWriter(folder) as writer:
            layer = writer.layer(layout)
            with pytest.raises(StoreError, match=r"down_proj\.weight .* not 4 times 140"):
                layer.write(component, bytes(560 + extra))
            for part in layout.record.components:
                layer.write(part, bytes(4 * part.nbytes))
            layer.finish()

    def test_a_checkpoint_file_called_like_the_manifest(self, folder, tmp_path):
        """Copied as it is, it would make an incomplete store look complete."""
        foreign = tmp_path / "flashmoe.json"
        foreign.write_bytes(b"{}")
        with StoreWriter(folder) as writer:
            with pytest.raises(StoreError, match=r"flashmoe\.json"):
                writer.copy(foreign)
            assert not is_store(folder)

    @pytest.mark.parametrize("most", [1000, 4096])
    def test_short_writes(self, folder, expected, monkeypatch, most):
        write, pwrite = os.write, os.pwrite
        monkeypatch.setattr(os, "write", lambda fd, view: write(fd, view[:most]))
        monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:most], at))
        write_one(folder)
        assert content_of(folder) == expected[0]


def test_everything_is_on_disk_before_the_rename(folder, monkeypatch):
    events = []
    replace = Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.fstat(fd).st_ino))

    def rename(path, target):
        events.append("rename")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", rename)
    write_one(folder)
    before = events[: events.index("rename")]
    assert {path.stat().st_ino for path in [folder, *folder.rglob("*")]} <= set(before)
    # The folder itself once more, so that the rename is on disk when the lock file goes.
    assert events[events.index("rename") + 1 :] == [folder.stat().st_ino]
    assert folder.stat().st_ino in before[-2:]


# What reaches the disk, by where it is looked up.
CALLS = [(os, "open"), (os, "write"), (os, "pwrite"), (os, "fsync"), (shutil, "copyfile")]
CALLS += [(Path, "mkdir"), (Path, "unlink"), (Path, "replace")]
# More than one run of `write_one` makes.
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
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            result = real(*args, **options)
            self.renamed = self.renamed or name == "replace"
            return result

        monkeypatch.setattr(home, name, call)


def crashing_run(folder, monkeypatch, n, seed):
    """One forced run on a disk that is full from the n-th call on."""
    with monkeypatch.context() as patch:
        crash = Crash(patch, n)
        try:
            write_one(folder, seed, force=True)
        except (OSError, StoreError):
            assert crash.count >= n
        else:
            assert crash.count < n
    return crash


@pytest.mark.parametrize("n", range(1, MOST_CALLS))
def test_a_full_disk_at_every_call(folder, expected, monkeypatch, n):
    descriptors = open_descriptors()
    crash = crashing_run(folder, monkeypatch, n, 0)
    assert open_descriptors() <= descriptors
    assert is_store(folder) == crash.renamed
    if crash.renamed:
        assert open_store(folder).manifest.parameters == 12_345
    else:
        with pytest.raises(StoreError, match="is not a complete flashmoe store"):
            open_store(folder)
    # The next run may write.
    write_one(folder, 1, force=True)
    assert content_of(folder) == expected[1]


@pytest.mark.parametrize("n", range(1, MOST_CALLS))
def test_a_full_disk_at_every_call_of_a_replacement(folder, expected, monkeypatch, n):
    write_one(folder, 0)
    crash = crashing_run(folder, monkeypatch, n, 1)
    if is_store(folder):
        # Either store whole, never a mixture.
        found = content_of(folder)
        assert {name: found[name] for name in FILES} == expected[crash.renamed]
        assert verify(folder).files == 3
    write_one(folder, 1, force=True)
    assert content_of(folder) == expected[1]


def test_no_call_is_left_out(folder, monkeypatch):
    with monkeypatch.context() as patch:
        crash = Crash(patch, 10**9)
        write_one(folder)
        first = crash.count
        write_one(folder, force=True)
        assert 20 < first < MOST_CALLS
        assert 20 < crash.count - first < MOST_CALLS
