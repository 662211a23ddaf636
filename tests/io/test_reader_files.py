"""Readers of files: descriptors, threads, sizes, and how requests become system calls."""

import contextlib
import errno
import os
import random
import threading
import time
from pathlib import Path

import pytest

from flashmoe.base.errors import OptionError, ReadError
from flashmoe.io.depth import MOST_PIECE_BYTES, Depth, cut
from flashmoe.io.mapped import MmapReader
from flashmoe.io.reader import ReadRequest
from tests.support.disk import open_descriptors
from tests.support.reader_cases import CONTENT, FILE_CASES, POOLS, Case, buffers_of, joined


@pytest.fixture(scope="module", params=FILE_CASES)
def file_case(request, tmp_path_factory):
    case = Case(request.param, tmp_path_factory.mktemp("readers"))
    case.write("a", CONTENT)
    return case


@pytest.fixture(params=list(POOLS))
def pool(request):
    """A pool of threads whose preadv can be replaced."""
    return POOLS[request.param]


def threads_here() -> set[str]:
    """Threads of this process, those of the native library too where the system lists them."""
    tasks = Path("/proc/self/task")
    if tasks.exists():
        return {path.name for path in tasks.iterdir()}
    return {str(thread.ident) for thread in threading.enumerate()}


class TestFiles:
    @pytest.mark.parametrize("offset", [2**31 - 3, 2**32 - 3, 2**32 + 5, 2**40 + 1])
    def test_far_offsets(self, file_case, offset):
        path = file_case.folder / f"far-{offset}"
        with path.open("wb") as file:
            file.seek(offset)
            file.write(b"flashmoe")
        reader = file_case.reader()
        buffers = buffers_of(5, 3, 5)
        reader.submit([ReadRequest(path, offset - 5, buffers)]).wait()
        assert [bytes(buffer) for buffer in buffers] == [bytes(5), b"fla", b"shmoe"]
        with pytest.raises(ReadError) as caught:
            reader.submit([ReadRequest(path, offset, buffers_of(9))]).wait()
        assert caught.value.offset == offset + 8
        reader.close()

    def test_more_buffers_than_one_system_call_takes(self, file_case):
        buffers = buffers_of(*[3] * 3000)
        with contextlib.closing(file_case.reader()) as reader:
            reader.submit([ReadRequest(file_case.folder / "a", 1, buffers)]).wait()
        assert joined(buffers) == CONTENT[1:9001]

    def test_descriptors_are_given_back(self, file_case):
        before = open_descriptors()
        reader = file_case.reader()
        paths = [file_case.write(f"file-{i}", CONTENT[i : i + 100]) for i in range(5)]
        for _ in range(3):
            reader.submit([ReadRequest(path, 0, buffers_of(100)) for path in paths]).wait()
        # A memory map has a descriptor of its own.
        each = 2 if "mmap" in file_case.name else 1
        assert len(open_descriptors() - before) == 5 * each
        reader.close()
        assert open_descriptors() <= before

    def test_threads_are_given_back(self, file_case):
        before = threads_here()
        reader = file_case.reader(threads=3)
        path = file_case.folder / "a"
        reader.submit([ReadRequest(path, i, buffers_of(9)) for i in range(30)]).wait()
        assert len(threads_here() - before) <= 3
        reader.close()
        # A thread that was joined is the system's for a moment more.
        ends = time.monotonic() + 5
        while not threads_here() <= before and time.monotonic() < ends:
            time.sleep(0.001)
        assert threads_here() <= before

    def test_a_folder(self, file_case):
        reader = file_case.reader()
        with pytest.raises(ReadError) as caught:
            reader.submit([ReadRequest(file_case.folder, 0, buffers_of(1))]).wait()
        assert caught.value.errno == errno.EISDIR
        reader.close()


def test_requests_run_at_the_same_time(tmp_path, pool):
    """Four threads meet inside preadv: with fewer, the barrier would break."""
    (tmp_path / "a").write_bytes(CONTENT)
    barrier = threading.Barrier(4, timeout=5)

    def preadv(descriptor, buffers, offset):
        barrier.wait()
        return os.preadv(descriptor, buffers, offset)

    reader = pool(4, preadv)
    requests = [ReadRequest(tmp_path / "a", i, buffers_of(10)) for i in range(8)]
    reader.submit(requests).wait()
    reader.close()
    assert [joined(request.buffers) for request in requests] == [
        CONTENT[i : i + 10] for i in range(8)
    ]


def test_one_call_per_small_request(tmp_path, pool):
    """A record's components and the padding between them are one read."""
    (tmp_path / "a").write_bytes(CONTENT)
    calls = []

    def preadv(descriptor, buffers, offset):
        calls.append((offset, [len(buffer) for buffer in buffers]))
        return os.preadv(descriptor, buffers, offset)

    reader = pool(1, preadv)
    reader.submit([ReadRequest(tmp_path / "a", 9, buffers_of(4, 0, 5, 6))]).wait()
    reader.close()
    assert calls == [(9, [4, 5, 6])]


def test_an_error_that_is_no_read_error_passes(tmp_path, pool):
    (tmp_path / "a").write_bytes(CONTENT)

    def preadv(descriptor, buffers, offset):
        raise MemoryError("injected")

    reader = pool(1, preadv)
    with pytest.raises(MemoryError, match="injected"):
        reader.submit([ReadRequest(tmp_path / "a", 0, buffers_of(1))]).wait()
    reader.close()


def test_a_large_request_is_read_in_pieces(tmp_path, pool):
    content = random.Random(1).randbytes(3_000_000)
    (tmp_path / "a").write_bytes(content)
    calls = []

    def preadv(descriptor, buffers, offset):
        calls.append((offset, sum(len(buffer) for buffer in buffers)))
        return os.preadv(descriptor, buffers, offset)

    with contextlib.closing(pool(4, preadv)) as reader:
        buffers = buffers_of(1000, 1_999_000, 990_000)
        reader.submit([ReadRequest(tmp_path / "a", 10_000, buffers)]).wait()
        assert joined(buffers) == content[10_000:]
        assert (reader.counters.reads, reader.counters.bytes) == (1, 2_990_000)
    calls.sort()
    assert len(calls) == 4
    assert [a + size for a, size in calls[:-1]] == [b for b, _ in calls[1:]]
    assert all(offset % 4096 == 0 for offset, _ in calls[1:])
    assert max(size for _, size in calls) - min(size for _, size in calls) <= 8192


@pytest.mark.parametrize(("piece_bytes", "calls"), [(100_000, 4), (399_999, 2), (400_000, 1)])
def test_pieces_are_as_large_as_said(tmp_path, pool, piece_bytes, calls):
    (tmp_path / "a").write_bytes(bytes(800_000))
    sizes = []

    def preadv(descriptor, buffers, offset):
        sizes.append(sum(len(buffer) for buffer in buffers))
        return os.preadv(descriptor, buffers, offset)

    with contextlib.closing(pool(3, preadv, piece_bytes=piece_bytes)) as reader:
        requests = [ReadRequest(tmp_path / "a", i, buffers_of(400_000)) for i in (0, 400_000)]
        reader.submit(requests).wait()
    assert len(sizes) == 2 * calls
    assert sum(sizes) == 800_000


@pytest.mark.parametrize(
    ("threads", "piece_bytes", "words"),
    [
        (0, None, "1 to 256 threads, not 0"),
        (-1, None, "1 to 256 threads, not -1"),
        (257, None, "1 to 256 threads, not 257"),
        (8, 0, "4096 to 1073741824 bytes, not 0"),
        (8, 4095, "bytes, not 4095"),
        (8, 2**30 + 1, "bytes, not 1073741825"),
    ],
)
@pytest.mark.parametrize("kind", [*POOLS.values(), MmapReader])
def test_depths_out_of_range(kind, threads, piece_bytes, words):
    with pytest.raises(OptionError, match=words):
        kind(threads, piece_bytes=piece_bytes)


def test_cutting():
    assert Depth(8).piece_of(10**8) == MOST_PIECE_BYTES
    assert Depth(8).piece_of(10**5) == 131_072
    assert Depth(8).piece_of(8 * 500_000) == 500_000
    assert Depth(8, 4096).piece_of(10**8) == 4096
    assert Depth(8, 2**30).piece_of(1) == 2**30
    assert cut(0, 0, 4096) == []
    assert cut(5, 6, 131_072) == [(5, 6)]
    assert cut(1, 9001, 4096) == [(1, 4096), (4096, 9001)]
    assert cut(4096, 4096 + 131_072, 131_072) == [(4096, 135_168)]
    assert cut(100, 400_000, 131_072) == [
        (100, 98_304),
        (98_304, 196_608),
        (196_608, 299_008),
        (299_008, 400_000),
    ]


class TestMaps:
    def test_a_file_that_shrinks_or_grows(self, tmp_path):
        """Reading a page behind the end would end the process."""
        path = tmp_path / "a"
        path.write_bytes(CONTENT)
        with contextlib.closing(MmapReader(2)) as reader:
            whole = ReadRequest(path, 0, buffers_of(50_000))
            reader.submit([whole]).wait()
            os.truncate(path, 20_000)
            with pytest.raises(ReadError, match="ends 30000 bytes too early") as caught:
                reader.submit([whole]).wait()
            assert caught.value.offset == 20_000
            path.write_bytes(CONTENT[::-1] * 3)
            after = ReadRequest(path, 100_000, buffers_of(50_000))
            reader.submit([after, whole]).wait()
            assert joined(after.buffers) == joined(whole.buffers) == CONTENT[::-1]

    def test_page_faults_are_counted(self, tmp_path):
        path = tmp_path / "a"
        path.write_bytes(bytes(2**22))
        with contextlib.closing(MmapReader(2)) as reader:
            before = reader.counters.minor_faults + reader.counters.major_faults
            reader.submit([ReadRequest(path, 0, buffers_of(2**22))]).wait()
            after = reader.counters.minor_faults + reader.counters.major_faults
        # The system may map several pages at a time.
        assert after - before >= 2**22 // 4096 // 512
