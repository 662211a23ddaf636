"""Damaged stores: every command says in one line what is wrong, and `verify` says where."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmoe.store.manifest import MANIFEST_NAME
from flashmoe.store.reader import open_store
from tests.support.commands import Run, assert_one_line

LAYER_FILE = "experts/layer-001.safetensors"


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def remove_manifest(store: Path) -> None:
    (store / MANIFEST_NAME).unlink()


def break_manifest(store: Path) -> None:
    (store / MANIFEST_NAME).write_text("{oops")


def raise_version(store: Path) -> None:
    manifest = json.loads((store / MANIFEST_NAME).read_text())
    (store / MANIFEST_NAME).write_text(json.dumps({**manifest, "version": 2}))


def remove_layer(store: Path) -> None:
    (store / LAYER_FILE).unlink()


def shorten_layer(store: Path) -> None:
    os.truncate(store / LAYER_FILE, (store / LAYER_FILE).stat().st_size - 1)


def break_layer_header(store: Path) -> None:
    overwrite(store / LAYER_FILE, 20, b"?")


def remove_resident(store: Path) -> None:
    next(store.glob("resident-*")).unlink()


def remove_config(store: Path) -> None:
    (store / "config.json").unlink()


DAMAGES = {
    remove_manifest: f"no {MANIFEST_NAME}",
    break_manifest: MANIFEST_NAME,
    raise_version: "version 2",
    remove_layer: LAYER_FILE,
    shorten_layer: LAYER_FILE,
    break_layer_header: "offset 20",
    remove_resident: "resident-00001-of-00001.safetensors",
    remove_config: "config.json is missing",
}


@pytest.fixture
def damaged(places: dict[str, Path], dest: Path) -> Path:
    """A copy of the tiny store, for the test to damage."""
    return shutil.copytree(places["store"], dest)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_store_is_one_line(
    damage: Callable[[Path], None], damaged: Path, run_cli: Run
) -> None:
    damage(damaged)
    for command in ("inspect", "verify"):
        assert_one_line(run_cli(command, damaged), 1, str(damaged), DAMAGES[damage])
    assert_one_line(run_cli("generate", damaged, "-p", "x"), 1, str(damaged))


def test_verify_names_the_damaged_tensor(damaged: Path, run_cli: Run) -> None:
    layout = open_store(damaged).manifest.layers[1].layout
    component = layout.record.components[1]
    offset = layout.record_offset(5) + component.offset
    overwrite(damaged / layout.file, offset + 3, b"\x5a\xa5")
    result = run_cli("verify", damaged, "--json")
    where = f"expert 5 {component.name} at offset {offset}"
    assert_one_line(result, 1, layout.file, layout.path, where)


def test_verify_names_the_damaged_resident_tensor(damaged: Path, run_cli: Run) -> None:
    shard = open_store(damaged).manifest.resident[0]
    overwrite(damaged / shard.file, len(shard.header) + 1, b"\x5a\xa5")
    result = run_cli("verify", damaged)
    where = f"{shard.tensors[0].name} at offset {len(shard.header)}"
    assert_one_line(result, 1, shard.file, where)


def test_store_whose_config_is_not_json_is_one_line(damaged: Path, run_cli: Run) -> None:
    (damaged / "config.json").write_text("{oops")
    assert_one_line(run_cli("generate", damaged, "-p", "x"), 1, "config.json")
    assert_one_line(run_cli("verify", damaged), 1, "config.json", "SHA-256")
