"""A sparse checkpoint becomes the store that the same bytes without holes become."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from flashmoe import StoreError, repack
from tests.support.checkpoints import checkpoint_tensors, store_tensors
from tests.support.families import FAMILIES
from tests.support.skips import require
from tests.support.stores import folder_content
from tests.support.synthetic.checkpoint import write_checkpoint
from tests.support.synthetic.sparse import as_published, plan_sparse


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def config(**sizes: int) -> dict[str, Any]:
    given = FAMILIES["qwen3_5_moe"]
    return {**given, "text_config": {**given["text_config"], **sizes}}


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """8 experts of 3 MB a layer, in 4 bits, of which a hundredth is not zero."""
    folder = tmp_path / "sparse" / "source"
    write_checkpoint(plan_sparse(config(hidden_size=512, moe_intermediate_size=1024)), folder)
    require("files with holes", disk_bytes(folder) <= 10 * 2**20)
    return folder


def test_bit_for_bit(sparse: Path, tmp_path: Path) -> None:
    store = repack(sparse, tmp_path / "store.flashmoe")
    assert store_tensors(store) == checkpoint_tensors(sparse)
    assert store.manifest.streamed_bytes > 20 * 2**20
    assert disk_bytes(store.path) < disk_bytes(sparse) + 2**20
    assert folder_content(store.path) == folder_content(of_dense_copy(sparse, tmp_path))


def test_quantized(tmp_path: Path) -> None:
    folder = tmp_path / "sparse" / "source"
    write_checkpoint(as_published(plan_sparse(config(), bits=16, expert_step=4)), folder)
    store = repack(folder, tmp_path / "store.flashmoe")
    assert folder_content(store.path) == folder_content(of_dense_copy(folder, tmp_path))


def of_dense_copy(sparse: Path, tmp_path: Path) -> Path:
    """The store of a checkpoint's copy that has no holes."""
    copy = tmp_path / "dense" / "source"
    shutil.copytree(sparse, copy, copy_function=written_again)
    assert disk_bytes(copy) >= sum(path.stat().st_size for path in copy.iterdir())
    return repack(copy, tmp_path / "dense.flashmoe").path


def written_again(source: str, dest: str) -> None:
    Path(dest).write_bytes(Path(source).read_bytes())


def test_what_a_sparse_source_needs_is_what_it_has(
    sparse: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(dest.parent)
    needed = sum(path.stat().st_blocks * 512 for path in sparse.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(StoreError, match="free some"):
        repack(sparse, dest)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert repack(sparse, dest).manifest.layers
