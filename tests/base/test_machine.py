"""What control groups leave, from files as Linux writes them."""

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from flashmoe.base import machine
from flashmoe.base.machine import cgroup_memory_left
from tests.support.skips import needs

GB = 10**9
V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 {inner} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    return tmp_path


def write(root, memberships, mounts):
    (root / "proc/self/cgroup").write_text(memberships + "\n")
    (root / "proc/self/mountinfo").write_text(
        "25 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n" + mounts + "\n"
    )


def group(root, path, **numbers):
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in numbers.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


class TestVersion2:
    def test_a_limit_of_its_own(self, root):
        write(root, "0::/user/app", V2_MOUNT)
        group(
            root,
            "user/app",
            memory__max=8 * GB,
            memory__high="max",
            memory__current=5 * GB,
            memory__stat=f"anon {GB}\nactive_file {GB}\ninactive_file {2 * GB}\n"
            f"slab_reclaimable {GB // 2}\nslab_unreclaimable 7\nunevictable 0",
        )
        # 5 GB held, 3.5 of which can be taken back.
        assert cgroup_memory_left(root) == 6.5 * GB

    def test_the_tightest_on_the_way_up(self, root):
        write(root, "0::/a/b/c", V2_MOUNT)
        group(root, "a/b/c", memory__max="max", memory__current=GB)
        group(root, "a/b", memory__max=9 * GB, memory__current=2 * GB)
        group(root, "a", memory__max=10 * GB, memory__high=6 * GB, memory__current=4 * GB)
        assert cgroup_memory_left(root) == 2 * GB

    def test_a_container_sees_its_own_group_as_the_root(self, root):
        write(root, "0::/", V2_MOUNT)
        group(root, "", memory__max=3 * GB, memory__current=GB)
        assert cgroup_memory_left(root) == 2 * GB

    def test_a_container_that_knows_its_path_outside(self, root):
        write(root, "0::/docker/abc", V2_MOUNT.replace(" / /sys", " /docker/abc /sys"))
        group(root, "", memory__max=3 * GB, memory__current=GB)
        assert cgroup_memory_left(root) == 2 * GB
        write(root, "0::/../other", V2_MOUNT)
        assert cgroup_memory_left(root) == 2 * GB

    def test_no_limit(self, root):
        write(root, "0::/app", V2_MOUNT)
        group(root, "app", memory__max="max", memory__high="max", memory__current=GB)
        assert cgroup_memory_left(root) is None

    def test_more_held_than_allowed(self, root):
        write(root, "0::/app", V2_MOUNT)
        group(root, "app", memory__max=GB, memory__current=2 * GB)
        assert cgroup_memory_left(root) == 0


class TestVersion1:
    def test_a_limit_of_its_own(self, root):
        write(root, "4:memory:/box\n1:cpu,cpuacct:/\n0::/", V1_MOUNTS.format(inner="/"))
        unlimited = {"memory__limit_in_bytes": 9223372036854771712}
        group(root, "memory", **unlimited, memory__usage_in_bytes=20 * GB)
        group(
            root,
            "memory/box",
            memory__limit_in_bytes=4 * GB,
            memory__usage_in_bytes=3 * GB,
            memory__stat=f"cache 5\ntotal_inactive_file {GB}\ntotal_active_file {GB}",
        )
        assert cgroup_memory_left(root) == 3 * GB

    def test_a_container(self, root):
        write(root, "4:memory:/docker/abc", V1_MOUNTS.format(inner="/docker/abc"))
        group(root, "memory", memory__limit_in_bytes=2 * GB, memory__usage_in_bytes=GB)
        assert cgroup_memory_left(root) == GB

    def test_no_limit(self, root):
        write(root, "4:memory:/", V1_MOUNTS.format(inner="/"))
        group(root, "memory", memory__limit_in_bytes=9223372036854771712)
        assert cgroup_memory_left(root) is None


def test_a_system_without_control_groups(tmp_path):
    assert cgroup_memory_left(tmp_path) is None


def test_the_smaller_of_machine_and_group(monkeypatch):
    available = machine.psutil.virtual_memory().available
    monkeypatch.setattr(machine, "cgroup_memory_left", lambda: 12_345)
    assert machine.usable_memory_bytes() == 12_345
    monkeypatch.setattr(machine, "cgroup_memory_left", lambda: None)
    assert machine.usable_memory_bytes() > available / 2


def test_only_a_mac_says_that_memory_is_short() -> None:
    if sys.platform != "darwin":
        assert not machine.memory_is_short()
    assert isinstance(machine.memory_is_short(), bool)


@pytest.mark.parametrize(("level", "short"), [(1, False), (2, True), (4, True)])
def test_the_levels_of_a_mac(level: int, short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a stand-in for sysctlbyname; no Mac has run this."""

    def sysctlbyname(name: bytes, old: Any, size: Any, new: None, n_new: Any) -> int:
        assert name == b"kern.memorystatus_vm_pressure_level"
        assert (size._obj.value, n_new.value) == (4, 0)
        old._obj.value = level
        return 0

    libc = SimpleNamespace(sysctlbyname=sysctlbyname)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    assert machine.memory_is_short() == short


@needs("Linux")
def test_freed_memory_goes_back() -> None:
    before = machine.resident_set_bytes()
    # Too small for mappings of their own, and something stays behind them.
    blocks = [bytearray(60_000) for _ in range(1000)]
    kept = blocks[::50]
    del blocks
    machine.release_freed_memory()
    assert machine.resident_set_bytes() - before < 10_000_000
    assert len(kept) == 20


def test_a_c_library_that_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    machine.release_freed_memory()
