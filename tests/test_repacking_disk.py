"""A disk that is full, and a destination that is taken."""

import os
import shutil
from pathlib import Path

import pytest
from disk import NO_SPACE, no_space
from refusals import refused

from flashmoe import StoreError, repack
from flashmoe.store.layout import Quantization
from flashmoe.store.reader import is_store


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
