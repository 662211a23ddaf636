"""How fast a checkpoint becomes a store, beside copying its weight files, both until on disk.

    python scripts/repack_rate.py CHECKPOINT --scratch FOLDER --rounds 5

Copy and repack take turns, each repack in a process of its own, whose peak memory is printed, and
the processor time of both, which says something on a busy machine too.
The page cache is dropped before each where this process may do that.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPACK = """
import sys
from flashmoe import repack
from flashmoe.base.machine import peak_resident_set_bytes

repack(sys.argv[1], sys.argv[2])
print(peak_resident_set_bytes())
"""


def drop_page_cache() -> bool:
    """Whether the next reads come from the disk."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def processor_seconds() -> float:
    """What the processes that ended have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def copy(source: Path, scratch: Path) -> float:
    """Seconds until copies of the weight files are on disk."""
    target = scratch / "copy"
    target.mkdir()
    paths = [str(path) for path in sorted(source.glob("model*.safetensors"))]
    started = time.perf_counter()
    subprocess.run(["cp", *paths, str(target)], check=True)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def repack(source: Path, scratch: Path) -> tuple[float, int]:
    """Seconds until the store is on disk, start of Python included, and peak memory in bytes."""
    target = scratch / "store"
    started = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-c", REPACK, str(source), str(target)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds, int(ran.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    size = sum(path.stat().st_size for path in options.source.glob("model*.safetensors"))
    copies, repacks, peak = [], [], 0
    busy: dict[str, list[float]] = {"cp": [], "repack": []}
    for _ in range(options.rounds):
        cold = drop_page_cache()
        before = processor_seconds()
        copies.append(size / copy(options.source, options.scratch) / 1e9)
        busy["cp"].append((processor_seconds() - before) / size * 1e9)
        drop_page_cache()
        before = processor_seconds()
        seconds, used = repack(options.source, options.scratch)
        repacks.append(size / seconds / 1e9)
        busy["repack"].append((processor_seconds() - before) / size * 1e9)
        peak = max(peak, used)
    print(f"{size / 1e9:.2f} GB, page cache {'cold' if cold else 'as it was'}")
    for name, rates in (("cp", copies), ("repack", repacks)):
        middle = statistics.median(rates)
        print(
            f"{name:<7} {middle:.3f} GB/s ({min(rates):.3f} to {max(rates):.3f}), "
            f"{statistics.median(busy[name]):.2f} s of processor time per GB"
        )
    share = statistics.median(repacks) / statistics.median(copies)
    print(f"repack runs at {share:.0%} of cp; peak memory {peak / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
