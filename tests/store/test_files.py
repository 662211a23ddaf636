"""Files of a store that are missing, are something else, or differ from what the manifest says."""

import json
import os

import pytest

from flashmoe.store.reader import open_store
from tests.support.stores import LAYER_FILE, RESIDENT_FILE, frugal, refuse_to_open

# Bytes of the safetensors files.
SIZES = {RESIDENT_FILE: 16_472, LAYER_FILE: 81_920}
FILES = ["config.json", *SIZES]
# What may stand where a file should be.
THINGS = {
    "folder": lambda path: path.mkdir(),
    "symlink loop": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,
}


def test_the_unchanged_store_opens(store_folder, good_store):
    with frugal():
        assert open_store(store_folder).manifest == good_store.manifest


def test_the_folder_is_missing(tmp_path):
    refuse_to_open(tmp_path / "none", "none is not a complete flashmoe store")


def test_the_folder_is_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    refuse_to_open(tmp_path / "file", str(tmp_path / "file"))


def test_the_manifest_is_missing(store_folder):
    (store_folder / "flashmoe.json").unlink()
    refuse_to_open(store_folder, "is not a complete flashmoe store", "flashmoe repack")


def test_the_config_is_missing(store_folder):
    (store_folder / "config.json").unlink()
    refuse_to_open(store_folder, "config.json is missing; repack the model")


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_missing(store_folder, name):
    (store_folder / name).unlink()
    refuse_to_open(store_folder, name)


@pytest.mark.parametrize("name", ["flashmoe.json", *FILES])
@pytest.mark.parametrize("thing", THINGS)
def test_a_file_is_something_else(store_folder, name, thing):
    (store_folder / name).unlink()
    THINGS[thing](store_folder / name)
    refuse_to_open(store_folder, name)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("change", ["a byte less", "a byte more", "nothing", "a sparse terabyte"])
def test_a_file_has_another_size(store_folder, name, change):
    size = SIZES[name]
    changes = {"a byte less": size - 1, "a byte more": size + 1, "nothing": 0}
    other = changes.get(change, 10**12)
    os.truncate(store_folder / name, other)
    refuse_to_open(store_folder, f"{name} has {other} bytes", f"implies {size}")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    ("position", "content"),
    [(0, b"\xff" * 8), (0, b"\0" * 8), (7, b"\x01"), (8, b"["), (16_383, b"\0")],
)
def test_other_header_bytes(store_folder, name, position, content):
    with (store_folder / name).open("r+b") as file:
        file.seek(position)
        file.write(content)
    refuse_to_open(store_folder, f"{name} is damaged: its header differs at offset {position}")


@pytest.mark.parametrize("name", SIZES)
def test_another_header_of_the_same_length(store_folder, name):
    with (store_folder / name).open("r+b") as file:
        head = file.read(16_384)
        other = head.replace(b'"dtype":"U8"', b'"dtype":"I8"').replace(b"[6,5]", b"[5,6]")
        file.seek(0)
        file.write(other)
    assert json.loads(other[8:]) != json.loads(head[8:])
    differs = next(i for i, (a, b) in enumerate(zip(head, other, strict=True)) if a != b)
    refuse_to_open(store_folder, f"{name} is damaged: its header differs at offset {differs}")
