"""SIGKILL at random moments of a repack: what is left never passes for a store unless it is one.

The kills are drawn over the interval in which a repack of 200 MB of float experts writes. Some
hit a first run, some one that replaces a complete store.
"""

import copy
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlx_lm.utils import save_config, save_model

from flashmoe import FlashMoEError, StoreError, repack, verify
from flashmoe.engine.model_cache import open_model
from flashmoe.store.manifest import MANIFEST_NAME
from flashmoe.store.reader import open_store
from flashmoe.store.writer import LOCK_NAME
from tests.support import families
from tests.support.commands import FLASHMOE
from tests.support.stores import folder_content

KILLS = 30
# The last of them run over a complete store, with --force.
FORCED = 5
SECONDS_AT_MOST = 30


@dataclass(frozen=True)
class Kill:
    """A repack that was killed `delay` seconds after it began to write; `returncode` is 0 when
    it was faster."""

    dest: Path
    delay: float
    returncode: int

    def __str__(self) -> str:
        files = sorted(str(path.relative_to(self.dest)) for path in self.dest.rglob("*"))
        return f"after {self.delay:.3f} s, code {self.returncode}: {files}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of four layers with 50 MB of float32 experts each."""
    folder = tmp_path_factory.mktemp("big")
    config = copy.deepcopy(families.FAMILIES["mixtral"])
    config |= {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    save_model(folder, families.build_model(config, seed=0))
    save_config(config, folder / "config.json")
    return folder


def run_repack(checkpoint: Path, dest: Path, until: Callable[[float], bool]) -> tuple[int, float]:
    """Run `flashmoe repack` until `until(seconds since it began to write)`, then kill it.

    Returns its exit code and how long it wrote.
    """
    lock = dest / LOCK_NAME
    with subprocess.Popen(
        [str(FLASHMOE), "repack", str(checkpoint), str(dest), "--force", "--json"],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(checkpoint)},
    ) as process:
        deadline = time.monotonic() + SECONDS_AT_MOST
        while not lock.exists() and process.poll() is None:
            assert time.monotonic() < deadline, f"{dest} was not begun"
            time.sleep(0.001)
        started = time.monotonic()
        while process.poll() is None and not until(time.monotonic() - started):
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        return process.wait(), time.monotonic() - started


@pytest.fixture(scope="module")
def kills(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Kill]:
    """Repacks killed at moments drawn evenly from 110% of the time that one takes."""
    root = tmp_path_factory.mktemp("killed")
    complete = root / "complete.flashmoe"
    returncode, interval = run_repack(checkpoint, complete, lambda s: s > SECONDS_AT_MOST)
    assert returncode == 0
    draw = random.Random(0)
    # One moment from each of as many equal parts, so that no phase is left out.
    delays = [1.1 * interval * (i + draw.random()) / KILLS for i in range(KILLS)]
    draw.shuffle(delays)

    def kill(case: int) -> Kill:
        dest = root / f"killed-{case:02d}.flashmoe"
        if case >= KILLS - FORCED:
            shutil.copytree(complete, dest)
        delay = delays[case]
        returncode, _ = run_repack(checkpoint, dest, lambda seconds: seconds > delay)
        return Kill(dest, delay, returncode)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(kill, range(KILLS)))


@pytest.mark.parametrize("case", range(KILLS))
def test_killed_repack_leaves_a_store_or_none(
    case: int, kills: list[Kill], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = kills[case]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert killed.returncode in (0, -signal.SIGKILL)
    if (killed.dest / MANIFEST_NAME).exists():
        assert verify(killed.dest).files == 4 + 1 + 1, killed
        assert open_model(killed.dest).manifest.model_type == "mixtral"
        return
    assert killed.returncode == -signal.SIGKILL, killed
    with pytest.raises(StoreError, match=MANIFEST_NAME):
        open_store(killed.dest)
    with pytest.raises(FlashMoEError, match=killed.dest.name):
        open_model(killed.dest)
    assert list(tmp_path.rglob(MANIFEST_NAME)) == []


def test_kills_hit_while_writing(kills: list[Kill]) -> None:
    unfinished = [k for k in kills if not (k.dest / MANIFEST_NAME).exists()]
    listing = "\n".join(map(str, kills))
    assert len(unfinished) >= KILLS // 2, listing
    blocks = {sum(p.stat().st_blocks for p in k.dest.rglob("*")) for k in unfinished}
    assert len(blocks) >= 3, listing


def test_incomplete_store_is_named_as_one(
    kills: list[Kill], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With config.json but no manifest: the most that an interrupted repack can leave.
    remains = tmp_path / "late.flashmoe"
    killed = next(k for k in kills if not (k.dest / MANIFEST_NAME).exists())
    shutil.copytree(killed.dest, remains)
    (remains / "config.json").write_text('{"model_type": "mixtral"}')
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreError, match="not a complete"):
        open_model(remains)


def test_rerun_over_the_remains(kills: list[Kill], checkpoint: Path) -> None:
    complete = folder_content(kills[0].dest.parent / "complete.flashmoe")
    for killed in kills:
        if not (killed.dest / MANIFEST_NAME).exists():
            # Not forced: an incomplete store is no obstacle.
            assert repack(checkpoint, killed.dest).path == killed.dest
        assert folder_content(killed.dest) == complete, killed
