"""Large pages hold the same bytes, zeroed, and the kernel says that they are there."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from flashmoe.io.reader import address_of
from flashmoe.streaming.pages import LARGE_PAGE_BYTES, zero_in_large_pages

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


@pytest.mark.parametrize("size", [0, 1, LARGE_PAGE_BYTES - 1])
def test_less_than_a_large_page_stays(size: int) -> None:
    memory = memoryview(bytearray(b"\xaa" * size))
    assert not zero_in_large_pages(memory)
    assert memory == b"\xaa" * size


@pytest.mark.skipif(sys.platform != "linux", reason="Linux gives large pages on request")
def test_large_pages() -> None:
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, 4 * LARGE_PAGE_BYTES, flags=private) as mapping:
        memory = memoryview(mapping)
        memory[:] = b"\xaa" * len(memory)
        # Neither end lies on a large page.
        part = memory[4096 : 4 * LARGE_PAGE_BYTES - 12288]
        if not zero_in_large_pages(part):
            assert "[never]" in (SETTING.read_text() if SETTING.exists() else "[never]")
            return
        address = address_of(memory)
        first = -(address + 4096) % LARGE_PAGE_BYTES + 4096
        size = (4096 + len(part) - first) // LARGE_PAGE_BYTES * LARGE_PAGE_BYTES
        assert size >= 2 * LARGE_PAGE_BYTES
        assert memory[:first] == b"\xaa" * first
        assert memory[first : first + size] == bytes(size)
        assert memory[first + size :] == b"\xaa" * (len(memory) - first - size)
        assert large_bytes(address + first) in range(LARGE_PAGE_BYTES, size + 1)
        part.release()
        memory.release()
