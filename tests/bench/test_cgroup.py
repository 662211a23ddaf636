"""Memory cgroups, where they can be made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flashmoe.bench import cgroup
from tests.support.skips import needs


@needs("root and a memory cgroup")
def test_a_limit_holds() -> None:
    with cgroup.memory_cgroup(64 * 2**20) as entrance:
        limit = entrance.with_name("memory.limit_in_bytes").read_text()
        assert int(limit) == 64 * 2**20
        enter = f"echo $$ > {entrance}; exec {sys.executable} -c 'b = bytearray(200 * 2**20)'"
        assert subprocess.run(["sh", "-c", enter], check=False).returncode == -9
    assert not entrance.parent.exists()


def test_no_cgroup_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "V1", tmp_path / "v1")
    monkeypatch.setattr(cgroup, "V2", tmp_path / "v2")
    with (
        pytest.raises(cgroup.CgroupError, match="Linux and root"),
        cgroup.memory_cgroup(2**30),
    ):
        pass
