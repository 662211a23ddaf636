"""Pages given back, taken anew, and large where the system has them."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flashmoe.bank.pages import LARGE_PAGE_BYTES, give_back, touch
from flashmoe.bank.reserve import reserve
from flashmoe.base import machine
from flashmoe.base.dtypes import shared_bytes
from flashmoe.io.reader import address_of
from tests.support.skips import needs

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def large_bytes(address: int) -> int:
    """Bytes in large pages of the mapping that holds an address."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field = line.split()[0]
        if "-" in field and not field.endswith(":"):
            first, last = (int(part, 16) for part in field.split("-"))
            found = first <= address < last
        elif found and field == "AnonHugePages:":
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no mapping holds {address:#x}")


def private(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


linux = needs("Linux")


@linux
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 9000])
def test_small_memories(size: int) -> None:
    memory = memoryview(bytearray(b"\xaa" * (size + 2)))
    part = memory[1:-1]
    assert give_back(part, size)
    assert memory == b"\xaa" * (size + 2)
    assert give_back(part, size // 2)
    assert memory[: 1 + size // 2] == b"\xaa" * (1 + size // 2)
    assert memory[-1] == 0xAA
    touch(part, size // 2, size)
    assert memory[: 1 + size // 2] == b"\xaa" * (1 + size // 2)
    assert memory[-1] == 0xAA


@linux
@pytest.mark.parametrize("kept", [0, 1, 4096, 5_000_000, 6 * LARGE_PAGE_BYTES - 20_000])
def test_pages_go_and_come_back(kept: int) -> None:
    with private(6 * LARGE_PAGE_BYTES) as mapping:
        memory = memoryview(mapping)
        # Neither end lies on a large page.
        part = memory[4096 : 6 * LARGE_PAGE_BYTES - 12288]
        touch(part, 0, len(part))
        memory[:] = b"\xaa" * len(memory)
        full = machine.resident_set_bytes()
        assert give_back(part, kept)
        given = len(part) - kept - 8192
        assert full - machine.resident_set_bytes() > given - 200_000
        assert memory[: 4096 + kept] == b"\xaa" * (4096 + kept)
        assert memory[-12288:] == b"\xaa" * 12288
        assert sum(large_bytes(address_of(part) + at) for at in (kept, len(part) - 1)) <= (
            2 * (kept // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES
        )
        touch(part, kept, len(part))
        assert machine.resident_set_bytes() > full - 200_000
        assert memory[: 4096 + kept] == b"\xaa" * (4096 + kept)
        assert not any(part[-(-(4096 + kept) // 4096) * 4096 - 4096 : -4096])
        part.release()
        memory.release()


@linux
def test_large_pages() -> None:
    with private(4 * LARGE_PAGE_BYTES) as mapping:
        memory = memoryview(mapping)
        part = memory[4096 : 4 * LARGE_PAGE_BYTES - 12288]
        touch(part, 0, len(part))
        first = -address_of(part) % LARGE_PAGE_BYTES
        large = large_bytes(address_of(part) + first)
        if not large:
            assert "[never]" in (SETTING.read_text() if SETTING.exists() else "[never]")
        assert large <= (len(part) - first) // LARGE_PAGE_BYTES * LARGE_PAGE_BYTES
        assert not any(part)
        part.release()
        memory.release()


def test_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    memory = memoryview(bytearray(b"\xaa" * 10_000))
    assert not give_back(memory, 0)
    assert memory == b"\xaa" * 10_000
    assert reserve(1000) is None


@linux
def test_reserved_memory_is_there_once_it_is_touched() -> None:
    reserve(1000)  # what MLX takes when it first reads a file stays taken
    before = machine.resident_set_bytes()
    array = reserve(2**28)
    assert array is not None
    memory = shared_bytes(array)
    assert (array.shape, array.dtype, len(memory)) == ((2**28,), mx.uint64, 2**31)
    assert machine.resident_set_bytes() - before < 2_000_000
    assert (memory[0], memory[2**30], memory[-1]) == (0, 0, 0)
    touch(memory, 0, 30_000_000)
    assert 29_000_000 < machine.resident_set_bytes() - before < 34_000_000


@linux
def test_what_cannot_be_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> mx.array:
        raise RuntimeError("[malloc] Unable to allocate 1 bytes.")

    monkeypatch.setattr(mx, "load", refuse)
    assert reserve(1000) is None


@linux
@pytest.mark.parametrize("n_words", [1, 17, 511, 512, 5000])
def test_reserved_memory_is_zero(n_words: int) -> None:
    """Also where the allocator hands out what was freed before."""
    for _ in range(20):
        dirty = mx.zeros(n_words, mx.uint64) - 1
        mx.eval(dirty)
        del dirty
        array = reserve(n_words)
        assert array is not None
        assert not np.array(array).any()
