"""Which records `bench io` reads: files of equal records, random batches, the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashmoe.store.layout import LayerLayout, RecordLayout
from flashmoe.store.reader import Store

# More files bring nothing but descriptors, of which fio opens one per job and file.
MOST_FILES = 16


@dataclass(frozen=True)
class RecordFiles:
    """Files that hold `per_file` records of one layout each, from `data_start` on."""

    paths: tuple[Path, ...]
    record: RecordLayout
    data_start: int
    per_file: int

    @property
    def records(self) -> int:
        return len(self.paths) * self.per_file

    def offset(self, number: int) -> int:
        """Where in its file a record begins."""
        return self.data_start + number * self.record.stride


def record_files(store: Store) -> RecordFiles:
    """The layer files whose records are alike, most bytes first; MOST_FILES of them at most,
    spread over the model's depth."""
    groups: dict[tuple[RecordLayout, int, int], list[LayerLayout]] = {}
    for layer in store.manifest.layers:
        layout = layer.layout
        key = (layout.record, layout.data_start, layout.n_experts)
        groups.setdefault(key, []).append(layout)
    (record, data_start, per_file), layouts = max(
        groups.items(), key=lambda item: sum(layout.file_bytes for layout in item[1])
    )
    count = min(len(layouts), MOST_FILES)
    chosen = [layouts[i * len(layouts) // count] for i in range(count)]
    return RecordFiles(
        tuple(store.file(layout.file) for layout in chosen), record, data_start, per_file
    )


def shuffled_batches(
    files: RecordFiles, size: int, draw: random.Random
) -> Iterator[list[tuple[Path, int]]]:
    """Every record once, as (path, offset), in random batches of `size`; the last may be smaller.

    A batch comes from one file, as decode's do, and the files take turns; what is left of each
    is mixed at the end.
    """
    whole: list[list[list[tuple[Path, int]]]] = []
    rest: list[tuple[Path, int]] = []
    for path in files.paths:
        numbers = draw.sample(range(files.per_file), files.per_file)
        places = [(path, files.offset(number)) for number in numbers]
        end = files.per_file // size * size
        whole.append([places[i : i + size] for i in range(0, end, size)])
        rest += places[end:]
    draw.shuffle(rest)
    for turn in zip(*whole, strict=True):
        yield from turn
    for i in range(0, len(rest), size):
        yield rest[i : i + size]


def ordered_batches(
    files: RecordFiles, size: int, draw: random.Random
) -> Iterator[list[tuple[Path, int]]]:
    """Batches of `size` records that follow one another in a file, as (path, offset), in random
    order; every record at most once, a file's last ones left out when they are fewer."""
    starts = range(0, files.per_file - size + 1, size)
    batches = [(path, start) for path in files.paths for start in starts]
    draw.shuffle(batches)
    for path, start in batches:
        yield [(path, files.offset(number)) for number in range(start, start + size)]


def evict(paths: Sequence[Path]) -> bool:
    """Drop clean pages of these files from the page cache; False where only root could (macOS)."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


def cached_share(paths: Sequence[Path]) -> float:
    """The share of these files' pages that is in the page cache; 0 where nobody can tell."""
    if sys.platform != "linux":
        return 0.0
    library = ctypes.CDLL(None, use_errno=True)
    cached = pages = 0
    for path in paths:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            size = len(mapped)
            state = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            view = np.frombuffer(mapped, np.uint8)
            code = library.mincore(
                ctypes.c_void_p(view.ctypes.data),
                ctypes.c_size_t(size),
                ctypes.c_void_p(state.ctypes.data),
            )
            del view
        if code:
            return 0.0
        cached += int(np.count_nonzero(state & 1))
        pages += len(state)
    return cached / pages
