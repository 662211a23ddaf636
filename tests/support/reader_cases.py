"""Every reader of the package, and those of readers.py, under the names that tests use."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flashmoe import native
from flashmoe.io.depth import BLOCK_BYTES, LARGEST_PIECE_BYTES
from flashmoe.io.files import uncached_problem
from flashmoe.io.mapped import MmapReader
from flashmoe.io.native import NativeReader
from flashmoe.io.reader import Reader
from flashmoe.io.threads import ThreadReader
from tests.support.delaying import DelayingReader
from tests.support.readers import (
    FaultyReader,
    MemoryReader,
    Preadv,
    broken_preadv,
    delayed_preadv,
    short_preadv,
)
from tests.support.skips import require

CONTENT = random.Random(0).randbytes(50_000)
ONES = b"\xaa"

Pool = type[ThreadReader] | type[NativeReader]
POOLS: dict[str, Pool] = {"threads": ThreadReader}
if native.available() is None:
    POOLS["native"] = NativeReader

# Given the system's preadv or a broken one, and the block that reads are made of.
WRAPPERS: dict[str, Callable[[Preadv, int], Preadv]] = {
    "": lambda preadv, block: preadv,
    "short reads": lambda preadv, block: short_preadv(1, preadv, block),
    "delays": lambda preadv, block: delayed_preadv(2, preadv),
    "short reads and delays": lambda preadv, block: delayed_preadv(
        3, short_preadv(3, preadv, block)
    ),
}
MODES = {"cached": True, "uncached": False}

# Readers of files that take `preadv`, as "pool, mode, wrapper".
PREADV_CASES = [
    ", ".join(filter(None, (pool, mode, wrapper)))
    for pool in POOLS
    for mode in MODES
    for wrapper in WRAPPERS
]
# Pieces of the least size there is, and of more than anything has that is read here.
PIECES = {"pieces of a block": BLOCK_BYTES, "no pieces": LARGEST_PIECE_BYTES}
DEPTH_CASES = [f"{pool}, {mode}, {name}" for pool in POOLS for mode in MODES for name in PIECES]
FILE_CASES = [
    *PREADV_CASES,
    *DEPTH_CASES,
    "mmap",
    *(f"mmap, {name}" for name in PIECES),
    *(f"{kind} {name}" for kind in ("faulty", "delaying") for name in (*POOLS, "mmap")),
]
CASES = ["memory", *FILE_CASES]


@dataclass
class Case:
    """An implementation and the files it reads."""

    name: str
    folder: Path
    files: dict[Path, bytes] = field(default_factory=dict)

    @property
    def uncached(self) -> bool:
        return ", uncached" in self.name

    def write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        self.files[path] = content
        require("uncached reads", not self.uncached or uncached_problem(path) is None)
        return path

    def reader(self, bad_offset: int | None = None, threads: int = 4) -> Reader:
        if self.name == "memory":
            return MemoryReader(self.files, bad_offset)
        pieces = PIECES.get(self.name.rpartition(", ")[2])
        if self.name.startswith("mmap"):
            inner = MmapReader(threads, pieces)
            return inner if bad_offset is None else FaultyReader(inner, 1, bad_offset)
        if self.name.startswith("faulty "):
            kind = self.name.removeprefix("faulty ")
            inner = MmapReader(threads) if kind == "mmap" else POOLS[kind](threads)
            return FaultyReader(inner, 2, bad_offset)
        if self.name.startswith("delaying "):
            named = self.name.removeprefix("delaying ")
            inner = Case(named if named == "mmap" else f"{named}, cached", self.folder).reader(
                bad_offset, threads
            )
            return DelayingReader(inner, bytes_per_second=1e9, delays=(0, 0, 0.0003, 0.001))
        pool, mode, *wrapper = self.name.split(", ")
        if pieces is not None:
            faulty = () if bad_offset is None else (broken_preadv(bad_offset),)
            return POOLS[pool](threads, *faulty, page_cache=MODES[mode], piece_bytes=pieces)
        preadv = os.preadv if bad_offset is None else broken_preadv(bad_offset)
        if not wrapper and bad_offset is None:
            return POOLS[pool](threads, page_cache=MODES[mode])
        block = 1 if MODES[mode] else BLOCK_BYTES
        wrapped = WRAPPERS["".join(wrapper)](preadv, block)
        return POOLS[pool](threads, wrapped, page_cache=MODES[mode])


def buffers_of(*sizes: int) -> list[memoryview]:
    return [memoryview(bytearray(ONES * size)) for size in sizes]


def joined(buffers: Sequence[memoryview]) -> bytes:
    return b"".join(buffers)
