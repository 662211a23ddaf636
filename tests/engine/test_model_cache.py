"""Where models are found, and that nothing is fetched or repacked twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flashmoe import OptionError, SourceError, StoreError
from flashmoe.engine.model_cache import open_model
from flashmoe.store.reader import Store
from tests.support.families import save_checkpoint
from tests.support.hub import COMMIT, NEWER, Hub


def test_a_hub_model_is_fetched_once(hub: Hub) -> None:
    first = open_model("owner/name")
    assert first.manifest.source.revision == COMMIT
    downloads = hub.downloads
    assert downloads > 0
    assert open_model("owner/name") == first
    assert hub.downloads == downloads


def test_a_newer_commit_is_another_model(hub: Hub) -> None:
    first = open_model("owner/name")
    hub.commit = NEWER
    second = open_model("owner/name")
    assert second.path != first.path
    assert second.manifest.source.revision == NEWER


def test_without_the_hub_the_newest_store_serves(hub: Hub) -> None:
    open_model("owner/name")
    hub.commit = NEWER
    newest = open_model("owner/name")
    hub.reachable = False
    assert open_model("owner/name") == newest
    with pytest.raises(SourceError, match="cannot be fetched from the Hub"):
        open_model("owner/name", bits=8)
    with pytest.raises(SourceError, match="cannot be fetched from the Hub"):
        open_model("owner/other")


def test_precisions_are_kept_apart(hub: Hub) -> None:
    stores = [open_model("owner/name", bits=bits) for bits in (None, 3, 8)]
    sizes = [store.manifest.streamed_bytes for store in stores]
    assert len({store.path for store in stores}) == 3
    assert sizes[1] <= sizes[0] <= sizes[2]


def test_recipes_are_kept_apart(hub: Hub) -> None:
    named = [open_model("owner/name", recipe=name) for name in ("4-bit", "3-bit", "2-bit")]
    fitted = open_model("owner/name", method="hqq")
    rounded = open_model("owner/name", recipe="3-bit", method="rtn")
    plain = open_model("owner/name")
    stores = [*named, fitted, rounded, plain]
    assert len({store.path for store in stores}) == len(stores)
    assert open_model("owner/name", recipe="3-bit") == named[1]
    with pytest.raises(OptionError, match="neither a file nor a recipe"):
        open_model("owner/name", recipe="5-bit")


@pytest.fixture
def folder(home: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, "qwen3_moe")
    return folder


def written(store: Store) -> int:
    return (store.path / "flashmoe.json").stat().st_mtime_ns


def test_a_folder_is_repacked_once(folder: Path) -> None:
    first = open_model(folder)
    stamp = written(first)
    assert written(open_model(folder)) == stamp
    (folder / "generation_config.json").write_text("{}")
    assert open_model(folder).path != first.path


@pytest.mark.parametrize("as_text", [str, Path], ids=["text", "path"])
def test_a_store_is_opened_where_it_is(folder: Path, as_text: Callable[[Path], object]) -> None:
    store = open_model(folder)
    assert open_model(as_text(store.path)).path == store.path  # type: ignore[arg-type]
    for asked in ({"bits": 4}, {"method": "rtn"}, {"recipe": "4-bit"}):
        with pytest.raises(OptionError, match="its bits are fixed"):
            open_model(store.path, **asked)  # type: ignore[arg-type]


def test_an_incomplete_store_is_called_so(folder: Path) -> None:
    store = open_model(folder)
    (store.path / "flashmoe.json").unlink()
    (store.path / "repack.lock").touch()
    with pytest.raises(StoreError, match="is not a complete flashmoe store"):
        open_model(store.path)
