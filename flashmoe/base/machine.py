"""What this machine and this process have and use, as the operating system counts it."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil


def usable_memory_bytes() -> int:
    """Memory that this process could still take without swapping, container limits included.

    Memory that holds nothing but the page cache counts as free.
    """
    usable = int(psutil.virtual_memory().available)
    left = cgroup_memory_left()
    return usable if left is None else min(usable, left)


def cgroup_memory_left(root: Path = Path("/")) -> int | None:
    """What the control groups of this process still allow, None when none of them has a limit.

    Every group on the way up has its own limit, from which comes off what its processes hold
    and the kernel cannot take back. `root` is where /proc and the groups are found.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    lefts = []
    for mount in mounts:
        # "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw"; see proc(5).
        before, _, after = mount.partition(" - ")
        inner, mounted_at = before.split()[3:5]
        kind, _, options = after.partition(" ")
        if kind == "cgroup2":
            files = _V2
            member = [line[3:] for line in memberships if line.startswith("0::")]
        elif kind == "cgroup" and "memory" in options.rpartition(" ")[2].split(","):
            files = _V1
            fields = [line.split(":", 2) for line in memberships]
            member = [path for _, controllers, path in fields if "memory" in controllers.split(",")]
        else:
            continue
        top = root / mounted_at.lstrip("/")
        for path in member:
            # A container may see a part of the hierarchy only, and its own path from the outside.
            group = top / path.removeprefix(inner).lstrip("/")
            if ".." in group.parts or not group.is_dir():
                group = top
            while True:
                lefts += files.left(group)
                if group == top:
                    break
                group = group.parent
    return min(lefts, default=None)


# Version 1 states the largest number of whole pages when there is no limit.
_UNLIMITED = 1 << 60


class _Files:
    """Where a version of control groups keeps its numbers."""

    def __init__(self, limits: tuple[str, ...], usage: str, reclaimable: tuple[str, ...]) -> None:
        self._limits = limits
        self._usage = usage
        self._reclaimable = reclaimable

    def left(self, group: Path) -> list[int]:
        """What each limit of a group leaves."""
        numbers = [_number(group / name) for name in self._limits]
        limits = [number for number in numbers if number is not None and number < _UNLIMITED]
        if not limits:
            return []
        held = _number(group / self._usage) or 0
        try:
            lines = (group / "memory.stat").read_text().splitlines()
        except OSError:
            lines = []
        pairs = [line.split() for line in lines]
        held -= sum(int(pair[1]) for pair in pairs if pair[0] in self._reclaimable)
        return [max(0, limit - max(0, held)) for limit in limits]


_V2 = _Files(
    ("memory.max", "memory.high"),
    "memory.current",
    ("active_file", "inactive_file", "slab_reclaimable"),
)
_V1 = _Files(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)


def memory_is_short() -> bool:
    """Whether the system itself says so, as macOS does; elsewhere it never does."""
    if sys.platform != "darwin":
        return False
    # 1 is normal, 2 a warning, 4 critical.
    level = ctypes.c_int(1)
    size = ctypes.c_size_t(ctypes.sizeof(level))
    name = b"kern.memorystatus_vm_pressure_level"
    sysctl = ctypes.CDLL(None).sysctlbyname
    failed = sysctl(name, ctypes.byref(level), ctypes.byref(size), None, ctypes.c_size_t(0))
    return failed == 0 and level.value > 1


def release_freed_memory() -> None:
    """Have the C library give back what it keeps of freed memory, where it can be told to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _number(path: Path) -> int | None:
    """The number in a file; None without one, as in "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def resident_set_bytes() -> int:
    """Memory of this process that is in RAM now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_set_bytes() -> int:
    """The most memory this process has had in RAM since it started."""
    if sys.platform == "linux":
        # ru_maxrss would also count the parent's memory from before exec.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Machine:
    """What a measurement holds for: the operating system up to its second number, the
    processor, its cores, the memory, and the disk that a folder is on."""

    system: str
    processor: str
    cores: int
    memory_bytes: int
    disk: str


def describe(folder: Path) -> Machine:
    """This machine, and the disk of `folder`, as far as the operating system names them."""
    release = ".".join(re.findall(r"\d+", platform.release())[:2])
    return Machine(
        system=f"{platform.system()} {release} {platform.machine()}",
        processor=_processor(),
        cores=os.cpu_count() or 1,
        memory_bytes=int(psutil.virtual_memory().total),
        disk=_disk(folder.resolve()),
    )


def _processor() -> str:
    if sys.platform == "darwin":
        return f"{_sysctl(b'machdep.cpu.brand_string')} ({_sysctl(b'hw.model')})"
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    # On x86; elsewhere numbers tell processors apart.
    found = re.findall(r"^(?:model name|CPU implementer|CPU part)\s*:\s*(.+)$", text, re.MULTILINE)
    return ", ".join(sorted(set(found))) or platform.processor() or "unknown"


def _sysctl(name: bytes) -> str:
    """A text that macOS knows by this name."""
    buffer = ctypes.create_string_buffer(256)
    size = ctypes.c_size_t(len(buffer))
    code = ctypes.CDLL(None).sysctlbyname(name, buffer, ctypes.byref(size), None, 0)
    return "unknown" if code else buffer.value.decode(errors="replace")


def _disk(folder: Path) -> str:
    """Device, its model where Linux says it, file system and mount point of a folder."""
    mounts = {Path(part.mountpoint): part for part in psutil.disk_partitions(all=True)}
    mount = next((parent for parent in (folder, *folder.parents) if parent in mounts), None)
    if mount is None:
        return "unknown"
    block = Path("/sys/class/block") / Path(mounts[mount].device).name
    models = [block / "device/model", block / "../device/model"]
    model = next((path.read_text().strip() for path in models if path.is_file()), "")
    return " ".join(filter(None, (mounts[mount].device, model, mounts[mount].fstype, str(mount))))
