"""A checkpoint folder that is used up while its store is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashmoe import OptionError, SourceError, repack
from flashmoe.repacking import walk
from tests.support.checkpoints import save_shards
from tests.support.commands import Run, assert_one_line
from tests.support.refusals import refused
from tests.support.stores import folder_content


@pytest.fixture
def sharded(float_qwen: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_shards(float_qwen, source)
    monkeypatch.setattr(walk, "STEP_SECONDS", 0.0)
    return source


@pytest.fixture
def kept(sharded: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files of a store whose checkpoint stays."""
    return folder_content(repack(sharded, tmp_path / "kept.flashmoe").path)


def weight_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("model*.safetensors")}


def test_weight_files_go_and_nothing_else(
    kept: dict[str, bytes], sharded: Path, dest: Path
) -> None:
    others = {path.name for path in sharded.iterdir()} - weight_files(sharded)
    repack(sharded, dest, consume=True)
    assert folder_content(dest) == kept
    assert {path.name for path in sharded.iterdir()} == others


@pytest.mark.parametrize("share", [0.2, 0.45, 0.7, 0.9, 1.0])
def test_an_interrupted_run_goes_on_with_what_is_left(
    kept: dict[str, bytes], sharded: Path, dest: Path, share: float
) -> None:
    def stop(done: int, total: int) -> None:
        if done >= share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repack(sharded, dest, consume=True, progress=stop)
    if share >= 0.45:
        assert len(weight_files(sharded)) < 3
    repack(sharded, dest)
    assert folder_content(dest) == kept


def test_a_file_that_someone_else_deleted(sharded: Path, dest: Path) -> None:
    def stop(done: int, total: int) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repack(sharded, dest, consume=True, progress=stop)
    (sharded / "model-2.safetensors").unlink()
    with refused(SourceError, "model-2.safetensors"):
        repack(sharded, dest, consume=True)


def test_links_are_not_consumed(sharded: Path, dest: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (sharded / "model-1.safetensors").rename(elsewhere)
    (sharded / "model-1.safetensors").symlink_to(elsewhere)
    with refused(OptionError, "model-1.safetensors", "link"):
        repack(sharded, dest, consume=True)
    assert not dest.exists()


def test_the_command_asks(run_cli: Run, kept: dict[str, bytes], sharded: Path, dest: Path) -> None:
    result = run_cli("repack", sharded, dest, "--consume")
    assert_one_line(result, 2, str(sharded), "--yes")
    assert len(weight_files(sharded)) == 3
    assert run_cli("repack", sharded, dest, "--consume", "--yes", "--json").json()["layers"]
    assert weight_files(sharded) == set()
    assert folder_content(dest) == kept
