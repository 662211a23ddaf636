"""Checkpoints that cannot be taken apart, whole or in part: read through MLX, to the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashmoe import OptionError, SourceError, repack
from flashmoe.repacking import lazy_model, row_graph
from tests.support.checkpoints import GOLDEN
from tests.support.hub import Hub
from tests.support.refusals import refused
from tests.support.stores import folder_content

PUZZLES = ("nothing is known", "one operation is not")


def puzzle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes sanitize one that cannot be traced, or one that does something new."""
    if name == PUZZLES[0]:
        monkeypatch.setattr(lazy_model, "trace", lambda *_: None)
    else:
        monkeypatch.delitem(row_graph._RULES, "Split")


@pytest.mark.parametrize("name", PUZZLES)
@pytest.mark.parametrize("method", ["rtn", "hqq"])
@pytest.mark.parametrize("bits", [32, 16, 4, 3])
def test_the_store_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, method: str, bits: int
) -> None:
    source = GOLDEN / "llama4"
    options: dict[str, Any] = {"bits": bits, "method": method}
    if bits < 16:
        options["group_size"] = 32
    known = repack(source, tmp_path / "known.flashmoe", **options)
    puzzle(name, monkeypatch)
    whole = repack(source, tmp_path / "whole.flashmoe", **options)
    assert folder_content(whole.path) == folder_content(known.path)


@pytest.mark.parametrize("name", PUZZLES)
def test_an_interrupted_run_goes_on(
    tmp_path: Path, dest: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    puzzle(name, monkeypatch)
    source = GOLDEN / "llama4"
    whole = folder_content(repack(source, tmp_path / "whole.flashmoe", bits=32).path)

    def stop(done: int, total: int) -> None:
        if 4 * done > 3 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repack(source, dest, bits=32, progress=stop)
    repack(source, dest, bits=32)
    assert folder_content(dest) == whole


def test_from_the_hub_it_is_refused(hub: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_model, "trace", lambda *_: None)
    with refused(SourceError, "byte ranges", "hf download"):
        repack("owner/name", dest)
    assert not dest.exists()


def test_it_cannot_be_consumed(
    float_qwen: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_model, "trace", lambda *_: None)
    with refused(OptionError, "--consume"):
        repack(float_qwen, dest, consume=True)
    assert not dest.exists()
