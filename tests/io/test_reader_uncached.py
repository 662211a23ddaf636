"""Reads past the page cache: aligned whatever is asked for, and never a wrong byte."""

import contextlib
import errno
import mmap
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.base.errors import ReadError
from flashmoe.io import files
from flashmoe.io.depth import BLOCK_BYTES
from flashmoe.io.files import OpenFiles, uncached_problem
from flashmoe.io.reader import ReadRequest, Scatter, address_of
from flashmoe.io.transfer import BOUNCE_BYTES, EndOfFile, FailedRead, Transfer
from tests.support.reader_cases import POOLS
from tests.support.readers import short_preadv
from tests.support.skips import require

# Neither a multiple of blocks nor of pieces.
CONTENT = random.Random(3).randbytes(1_500_007)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("uncached") / "a"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(scope="module")
def uncached_path(path):
    require("uncached reads", uncached_problem(path) is None)
    return path


@pytest.fixture(scope="module", params=list(POOLS))
def pool(request):
    return POOLS[request.param]


def placed(shift, size):
    """A buffer whose address is `shift` bytes behind a block's beginning."""
    memory = memoryview(mmap.mmap(-1, shift + size + BLOCK_BYTES))
    memory[:] = b"\xaa" * len(memory)
    return memory, memory[shift : shift + size]


@st.composite
def scatters(draw):
    """An offset, and buffers as (shift of the address, size)."""
    sizes = st.one_of(
        st.integers(0, 10_000),
        st.integers(0, 100).map(lambda n: n * BLOCK_BYTES),
        st.integers(250_000, 600_000),
    )
    shifts = st.one_of(st.just(0), st.integers(0, BLOCK_BYTES - 1))
    buffers = draw(st.lists(st.tuples(shifts, sizes), min_size=1, max_size=6))
    total = sum(size for _, size in buffers)
    room = max(0, len(CONTENT) - total)
    offsets = [st.integers(0, room), st.integers(0, room // 4096).map(lambda n: n * 4096)]
    return draw(st.one_of(*offsets, st.just(room))), buffers


def aligned_preadv(descriptor, buffers, offset):
    assert offset % BLOCK_BYTES == 0
    for buffer in buffers:
        assert len(buffer) % BLOCK_BYTES == 0
        assert address_of(buffer) % BLOCK_BYTES == 0
    return os.preadv(descriptor, buffers, offset)


def check(read, case):
    """`read(offset, buffers)` gives the file's bytes and touches nothing around the buffers."""
    offset, described = case
    memories = [placed(*buffer) for buffer in described]
    total = sum(size for _, size in described)
    missing = offset + total - len(CONTENT)
    if missing > 0:
        with pytest.raises((ReadError, EndOfFile)) as caught:
            read(offset, [view for _, view in memories])
        assert caught.value.offset == max(offset, len(CONTENT))
        if isinstance(caught.value, ReadError):
            behind = offset + total - caught.value.offset
            assert f"ends {behind} bytes too early" in str(caught.value)
    else:
        read(offset, [view for _, view in memories])
        assert b"".join(view for _, view in memories) == CONTENT[offset : offset + total]
    for (memory, view), (shift, size) in zip(memories, described, strict=True):
        view.release()
        assert set(memory[:shift]) | set(memory[shift + size :]) <= {0xAA}


@settings(max_examples=60)
@given(scatters(), st.sampled_from([None, 1, 2]))
def test_everything_that_is_read_is_aligned(path, case, seed):
    """On any file system: a plain descriptor does, the transfer does not know."""
    preadv = aligned_preadv if seed is None else short_preadv(seed, aligned_preadv, BLOCK_BYTES)
    transfer = Transfer(preadv, uncached=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:

        def read(offset, buffers):
            scatter = Scatter(buffers)
            transfer.fill(descriptor, scatter, offset, offset, offset + scatter.nbytes)

        check(read, case)
    finally:
        os.close(descriptor)


@settings(max_examples=60)
@given(scatters())
def test_any_alignment(uncached_path, pool, case):
    with contextlib.closing(pool(3, page_cache=False)) as reader:
        check(lambda at, views: reader.submit([ReadRequest(uncached_path, at, views)]).wait(), case)


@pytest.mark.parametrize(
    "case",
    [
        (len(CONTENT) - 7, [(0, 8)]),
        (len(CONTENT) - 7, [(0, 3), (5, 4096)]),
        (len(CONTENT), [(0, 4096)]),
        (1_499_136, [(0, 8192)]),
        (1_499_136 + 4096, [(0, 4096)]),
        (0, [(0, 1_499_136), (0, 4096)]),
        (10**9, [(1, 1)]),
    ],
)
def test_where_the_file_ends(uncached_path, pool, case):
    with contextlib.closing(pool(3, page_cache=False)) as reader:
        check(lambda at, views: reader.submit([ReadRequest(uncached_path, at, views)]).wait(), case)


def test_aligned_reads_go_straight_to_their_place(path):
    calls = []

    def preadv(descriptor, buffers, offset):
        calls.append((offset, [(address_of(buffer), len(buffer)) for buffer in buffers]))
        return aligned_preadv(descriptor, buffers, offset)

    _, first = placed(0, 16_384)
    _, second = placed(0, 4196)
    _, third = placed(0, 3996 + 8192)
    descriptor = os.open(path, os.O_RDONLY)
    scatter = Scatter([first, second, third])
    Transfer(preadv, uncached=True).fill(descriptor, scatter, 4096, 4096, 4096 + scatter.nbytes)
    os.close(descriptor)
    assert b"".join(scatter) == CONTENT[4096 : 4096 + scatter.nbytes]
    [(offset, buffers)] = calls
    assert offset == 4096
    # The block that two buffers share is bounced, and what lies unaligned in the third.
    assert buffers[:2] == [(address_of(first), 16_384), (address_of(second), 4096)]
    assert [size for _, size in buffers] == [16_384, 4096, 4096 + 8192]


def test_more_than_the_bounce_buffer_takes_at_once(path):
    calls = []

    def preadv(descriptor, buffers, offset):
        calls.append((offset, sum(len(buffer) for buffer in buffers)))
        return aligned_preadv(descriptor, buffers, offset)

    descriptor = os.open(path, os.O_RDONLY)
    _, view = placed(1, 600_000)
    Transfer(preadv, uncached=True).fill(descriptor, Scatter([view]), 0, 0, 600_000)
    os.close(descriptor)
    assert view == CONTENT[:600_000]
    assert calls == [
        (i * BOUNCE_BYTES, size) for i, size in ((0, BOUNCE_BYTES), (1, BOUNCE_BYTES), (2, 77_824))
    ]


def test_a_disk_that_gives_part_of_a_block(path):
    """Reading it again brings nothing new, and the file goes on: no end, a failure."""
    descriptor = os.open(path, os.O_RDONLY)

    def preadv(descriptor, buffers, offset):
        return min(os.preadv(descriptor, buffers, offset), 8192 + 512 - offset)

    _, view = placed(0, 16_384)
    with pytest.raises(FailedRead) as caught:
        Transfer(preadv, uncached=True).fill(descriptor, Scatter([view]), 0, 0, 16_384)
    os.close(descriptor)
    assert (caught.value.offset, caught.value.errno) == (8192 + 512, errno.EIO)


class TestFileSystems:
    def test_one_that_needs_the_page_cache(self, path, pool, monkeypatch):
        def refuse(path):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        monkeypatch.setattr(files, "_open_uncached", refuse)
        assert uncached_problem(path) == os.strerror(errno.EINVAL)
        with contextlib.closing(pool(1, page_cache=False)) as reader:
            with pytest.raises(ReadError, match="only through the page cache") as caught:
                reader.submit([ReadRequest(path, 5, placed(0, 10)[1:])])
            assert (caught.value.offset, caught.value.errno) == (5, errno.EINVAL)

    def test_one_that_accepts_the_flag_and_refuses_to_read(self, path, monkeypatch):
        class Opened:
            def preadv(self, descriptor, buffers, offset):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        monkeypatch.setattr(os, "preadv", Opened().preadv)
        monkeypatch.setattr(files, "_open_uncached", lambda path: os.open(path, os.O_RDONLY))
        assert uncached_problem(path) == os.strerror(errno.EINVAL)

    def test_a_file_that_is_not_there(self, path):
        with pytest.raises(ReadError) as caught:
            uncached_problem(path.with_name("none"))
        assert caught.value.errno == errno.ENOENT

    def test_a_folder(self, path):
        opened = OpenFiles(page_cache=False)
        with pytest.raises(ReadError) as caught:
            opened.descriptor(Path(path.parent), 0)
        assert caught.value.errno == errno.EISDIR
