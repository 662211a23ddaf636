"""Runs of a writer: what one leaves behind that does not commit, and what the next makes of it."""

import pytest

from flashmoe.base.errors import StoreError
from flashmoe.store.manifest import Manifest
from flashmoe.store.reader import is_store, open_store
from flashmoe.store.verify import verify
from flashmoe.store.writer import StoreWriter
from tests.support.stores import (
    ONE_LAYER_FILES,
    RESIDENT_FILE,
    SOURCE,
    folder_content,
    layer_contents,
    layer_layout,
    resident_contents,
    write_layer,
    write_one_layer,
    write_resident,
    write_tiny,
)

pytestmark = pytest.mark.usefixtures("fast_disk")


@pytest.fixture
def template(tmp_path):
    """A file of a checkpoint that `write_one_layer` does not copy."""
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"old")
    return path


def test_force_replaces(dest, one_layer_files):
    write_one_layer(dest, 0)
    write_one_layer(dest, 1, force=True)
    assert folder_content(dest) == one_layer_files[1]
    assert verify(dest).files == 3


def test_force_leaves_no_layer_of_the_old_store(dest, one_layer_files):
    write_tiny(dest, 0, n_layers=3)
    write_one_layer(dest, 0, force=True)
    assert folder_content(dest) == one_layer_files[0]


def test_force_leaves_no_copied_file_of_the_old_store(dest, template):
    """A chat template of the old model would be the new model's."""
    with StoreWriter(dest) as writer:
        copied = {template.name: writer.copy(template)}
        writer.commit(Manifest("tiny", 0, SOURCE, {}, (), (), copied))
    write_one_layer(dest, force=True)
    assert sorted(folder_content(dest)) == ONE_LAYER_FILES


def test_force_works_on_nothing_and_on_the_incomplete(dest, one_layer_files):
    with StoreWriter(dest, force=True):
        pass
    write_one_layer(dest, 0, force=True)
    assert folder_content(dest) == one_layer_files[0]


def test_leaving_without_commit(dest, one_layer_files):
    with StoreWriter(dest) as writer:
        write_resident(writer, resident_contents())
    assert not is_store(dest)
    with pytest.raises(StoreError, match="is not a complete flashmoe store"):
        open_store(dest)
    write_one_layer(dest)
    assert folder_content(dest) == one_layer_files[0]


def test_leaving_by_an_error_in_the_middle(dest, one_layer_files):
    with pytest.raises(KeyboardInterrupt), StoreWriter(dest) as writer:
        writer.create(RESIDENT_FILE, b"header", 100)
        raise KeyboardInterrupt
    assert not is_store(dest)
    write_one_layer(dest)
    assert folder_content(dest) == one_layer_files[0]


def test_a_forced_run_gives_the_old_store_up(dest):
    write_one_layer(dest)
    with StoreWriter(dest, force=True):
        pass
    assert not is_store(dest)


def test_copied_files_of_an_interrupted_run_go(dest, template):
    with StoreWriter(dest) as writer:
        writer.copy(template)
    write_one_layer(dest)
    assert sorted(folder_content(dest)) == ONE_LAYER_FILES


def test_the_lock_goes_with_the_commit(dest):
    with StoreWriter(dest):
        assert (dest / "repack.lock").is_file()
    assert (dest / "repack.lock").is_file()
    write_one_layer(dest)
    assert not (dest / "repack.lock").exists()


def test_the_manifest_comes_last(dest):
    layout = layer_layout()
    with StoreWriter(dest) as writer:
        write_layer(writer, layout, layer_contents(layout))
        assert not is_store(dest)


def test_parents_are_made(tmp_path):
    folder = tmp_path / "a" / "b" / "c.flashmoe"
    with StoreWriter(folder):
        pass
    assert (folder / "repack.lock").is_file()
