"""A disk that is full, and a destination that is taken."""

import os
import shutil
from pathlib import Path

import pytest

from flashmoe import StoreError, repack
from flashmoe.probe.record_files import cached_share, evict
from flashmoe.repacking import walk
from flashmoe.repacking.journal import Journal
from flashmoe.store.layout import Quantization
from flashmoe.store.reader import is_store
from tests.support.disk import NO_SPACE, no_space
from tests.support.refusals import refused
from tests.support.skips import needs, require


def test_a_full_disk_is_noticed_before_writing(float_qwen, dest, monkeypatch):
    usage = shutil.disk_usage(dest.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
        with refused(StoreError, str(dest), "free"):
            repack(float_qwen, dest)
    assert not is_store(dest)
    assert repack(float_qwen, dest).manifest.layers


@pytest.mark.parametrize(
    ("home", "call"),
    [(os, "pwrite"), (os, "write"), (Path, "replace")],
    ids=["pwrite", "write", "replace"],
)
def test_a_disk_that_fills_up_while_writing(float_qwen, dest, monkeypatch, home, call):
    with monkeypatch.context() as patch:
        patch.setattr(home, call, no_space)
        with refused(StoreError, str(dest), NO_SPACE):
            repack(float_qwen, dest)
    assert not is_store(dest)
    assert repack(float_qwen, dest).manifest.layers


def test_an_existing_store_is_replaced_only_by_force(float_qwen, dest):
    repack(float_qwen, dest, bits=8)
    with refused(StoreError, str(dest), "--force"):
        repack(float_qwen, dest, bits=4)
    layout = repack(float_qwen, dest, bits=4, force=True).manifest.layers[0].layout
    assert layout.projections["up_proj"] == Quantization(4, 64)


@needs("Linux")
def test_the_page_cache_is_left_to_others(float_qwen, dest):
    source = list(float_qwen.glob("*.safetensors"))
    assert evict(source)
    require("a page cache that can be emptied", not cached_share(source))
    store = repack(float_qwen, dest)
    records = [dest / layer.layout.file for layer in store.manifest.layers]
    # What remains are headers, with what was read ahead of them.
    assert cached_share(records) < 0.6
    read = [path.read_bytes() for path in records]
    assert all(read)
    assert cached_share(records) == 1.0


def test_much_that_was_written_is_noted_at_once(float_qwen, dest, monkeypatch):
    lines = []
    add = Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, entry: lines.append(add(self, entry)))
    monkeypatch.setattr("flashmoe.repacking.schedule.PIECE_BYTES", 32 * 2**10)
    monkeypatch.setattr(walk, "STEP_SECONDS", 1000.0)
    repack(float_qwen, dest)
    few = len(lines)
    monkeypatch.setattr(walk, "STEP_BYTES", 64 * 2**10)
    repack(float_qwen, dest, force=True)
    assert len(lines) - few > few
