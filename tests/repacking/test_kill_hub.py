"""Processes that repack from the Hub: killed while they fetch, and two at once."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlx_lm.utils import save_config, save_model

from flashmoe.store.manifest import MANIFEST_NAME
from flashmoe.store.writer import LOCK_NAME
from tests.support import families
from tests.support.checkpoints import save_shards
from tests.support.commands import FLASHMOE
from tests.support.hub import Hub
from tests.support.stores import folder_content

SECONDS_AT_MOST = 60


@pytest.fixture(scope="module")
def slow_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Mixtral of 50 MB in three files, on a Hub that takes its time."""
    root = tmp_path_factory.mktemp("hub")
    config = copy.deepcopy(families.FAMILIES["mixtral"])
    config |= {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2}
    save_model(root / "whole", families.build_model(config, seed=0))
    save_config(config, root / "whole" / "config.json")
    hub = Hub(root)
    save_shards(root / "whole", hub.files)
    hub.delay = 0.05
    yield hub
    hub.close()


def start(hub: Hub, dest: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(FLASHMOE), "repack", "owner/name", str(dest), "--json"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **hub.environment},
    )


def run(hub: Hub, dest: Path) -> None:
    with start(hub, dest) as process:
        _, err = process.communicate(timeout=SECONDS_AT_MOST)
    assert process.returncode == 0, err


@pytest.fixture(scope="module")
def undisturbed(slow_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    dest = tmp_path_factory.mktemp("undisturbed") / "store"
    run(slow_hub, dest)
    return folder_content(dest)


def wait_for(condition: bool, process: subprocess.Popen[bytes], deadline: float) -> bool:
    assert time.monotonic() < deadline
    time.sleep(0.001)
    return condition or process.poll() is not None


@pytest.mark.parametrize("ranges", [4, 8, 12])
def test_killed_while_fetching(
    undisturbed: dict[str, bytes], slow_hub: Hub, dest: Path, ranges: int
) -> None:
    slow_hub.forget_ranges()
    deadline = time.monotonic() + SECONDS_AT_MOST
    with start(slow_hub, dest) as process:
        while not wait_for(len(slow_hub.ranges) >= ranges, process, deadline):
            pass
        process.send_signal(signal.SIGKILL)
    assert not (dest / MANIFEST_NAME).exists()
    run(slow_hub, dest)
    assert folder_content(dest) == undisturbed


def test_the_second_of_two_refuses(
    undisturbed: dict[str, bytes], slow_hub: Hub, dest: Path
) -> None:
    deadline = time.monotonic() + SECONDS_AT_MOST
    slow_hub.delay = 0.5
    with start(slow_hub, dest) as first:
        while not wait_for((dest / LOCK_NAME).exists(), first, deadline):
            pass
        os.kill(first.pid, signal.SIGSTOP)
        with start(slow_hub, dest) as second:
            _, err = second.communicate(timeout=SECONDS_AT_MOST)
        os.kill(first.pid, signal.SIGCONT)
        first.communicate(timeout=SECONDS_AT_MOST)
    slow_hub.delay = 0.05
    assert (first.returncode, second.returncode) == (0, 1)
    assert b"is being written by another process" in err
    assert folder_content(dest) == undisturbed
