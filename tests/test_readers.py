"""One contract, every reader through it."""

import contextlib
import errno
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from disk import open_descriptors
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import MemoryReader, broken_preadv, delayed_preadv, short_preadv

from flashmoe.errors import FlashMoEError, ReadError
from flashmoe.io.reader import Reader, ReadRequest
from flashmoe.io.threads import ThreadReader

CONTENT = random.Random(0).randbytes(50_000)
ONES = b"\xaa"

WRAPPERS: dict[str, Callable[..., Callable[..., int]]] = {
    "threads": lambda preadv: preadv,
    "short reads": lambda preadv: short_preadv(1, preadv),
    "delays": lambda preadv: delayed_preadv(2, preadv),
    "short reads and delays": lambda preadv: delayed_preadv(3, short_preadv(3, preadv)),
}


@dataclass
class Case:
    """An implementation and the files it reads."""

    name: str
    folder: Path
    files: dict[Path, bytes] = field(default_factory=dict)

    def write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        self.files[path] = content
        return path

    def reader(self, bad_offset: int | None = None, threads: int = 4) -> Reader:
        if self.name == "memory":
            return MemoryReader(self.files, bad_offset)
        preadv = os.preadv if bad_offset is None else broken_preadv(bad_offset)
        return ThreadReader(threads, WRAPPERS[self.name](preadv))


@pytest.fixture(scope="module", params=[*WRAPPERS, "memory"])
def case(request, tmp_path_factory):
    case = Case(request.param, tmp_path_factory.mktemp("readers"))
    case.write("a", CONTENT)
    case.write("b", CONTENT[::-1])
    case.write("empty", b"")
    return case


@pytest.fixture(scope="module", params=list(WRAPPERS))
def file_case(request, tmp_path_factory):
    case = Case(request.param, tmp_path_factory.mktemp("readers"))
    case.write("a", CONTENT)
    return case


@pytest.fixture
def reader(case):
    reader = case.reader()
    yield reader
    reader.close()


def buffers_of(*sizes):
    return [memoryview(bytearray(ONES * size)) for size in sizes]


def joined(buffers):
    return b"".join(buffers)


class TestContract:
    def test_one_buffer(self, case, reader):
        buffers = buffers_of(1000)
        reader.submit([ReadRequest(case.folder / "a", 123, buffers)]).wait()
        assert joined(buffers) == CONTENT[123:1123]

    def test_scatter(self, case, reader):
        buffers = buffers_of(0, 7, 0, 0, 4096, 1, 0)
        request = ReadRequest(case.folder / "a", 5, buffers)
        assert request.nbytes == 4104
        reader.submit([request]).wait()
        assert joined(buffers) == CONTENT[5:4109]
        assert buffers[1] == CONTENT[5:12]
        assert buffers[5] == CONTENT[4108:4109]

    def test_slices_of_one_array(self, case, reader):
        array = bytearray(ONES * 100)
        view = memoryview(array)
        request = ReadRequest(case.folder / "a", 0, [view[60:70], view[10:20]])
        reader.submit([request]).wait()
        expected = bytearray(ONES * 100)
        expected[60:70], expected[10:20] = CONTENT[:10], CONTENT[10:20]
        assert array == expected

    def test_several_requests(self, case, reader):
        draw = random.Random(4)
        requests = []
        for _ in range(40):
            sizes = [draw.randint(0, 300) for _ in range(draw.randint(1, 5))]
            offset = draw.randint(0, len(CONTENT) - sum(sizes))
            requests.append(
                ReadRequest(case.folder / draw.choice("ab"), offset, buffers_of(*sizes))
            )
        reader.submit(requests).wait()
        for request in requests:
            content = case.files[request.path]
            assert joined(request.buffers) == content[request.offset :][: request.nbytes]
        assert reader.counters.reads == 40
        assert reader.counters.bytes == sum(request.nbytes for request in requests)

    def test_several_batches_at_once(self, case, reader):
        batches = [
            [ReadRequest(case.folder / "a", 100 * i + j, buffers_of(50, 50)) for j in range(5)]
            for i in range(6)
        ]
        tickets = [reader.submit(batch) for batch in batches]
        for ticket in reversed(tickets):
            ticket.wait()
            ticket.wait()
        for i, batch in enumerate(batches):
            for j, request in enumerate(batch):
                assert joined(request.buffers) == CONTENT[100 * i + j :][:100]

    def test_submitting_from_several_threads(self, case, reader):
        found = {}

        def work(first):
            buffers = buffers_of(900)
            reader.submit([ReadRequest(case.folder / "b", first, buffers)]).wait()
            found[first] = joined(buffers)

        threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {1000 * i: CONTENT[::-1][1000 * i :][:900] for i in range(8)}
        assert (reader.counters.reads, reader.counters.bytes) == (8, 7200)

    def test_nothing_to_read(self, case, reader):
        reader.submit([]).wait()
        reader.submit([ReadRequest(case.folder / "empty", 0, [])]).wait()
        reader.submit([ReadRequest(case.folder / "empty", 10, buffers_of(0, 0))]).wait()
        assert reader.counters.bytes == 0

    def test_up_to_the_last_byte(self, case, reader):
        buffers = buffers_of(10)
        reader.submit([ReadRequest(case.folder / "a", len(CONTENT) - 10, buffers)]).wait()
        assert joined(buffers) == CONTENT[-10:]

    @pytest.mark.parametrize(
        ("offset", "size"), [(49_990, 11), (0, 50_001), (50_000, 1), (70_000, 5)]
    )
    def test_the_file_ends_too_early(self, case, reader, offset, size):
        path = case.folder / "a"
        buffers = buffers_of(size // 2, size - size // 2)
        ticket = reader.submit([ReadRequest(path, offset, buffers)])
        with pytest.raises(ReadError, match="too early") as caught:
            ticket.wait()
        error = caught.value
        end = max(offset, len(CONTENT))
        assert (error.path, error.offset, error.errno) == (str(path), end, None)
        assert f"cannot read {path} at offset {end}" in str(error)
        assert f"{offset + size - end} bytes too early" in str(error)

    def test_an_empty_file(self, case, reader):
        ticket = reader.submit([ReadRequest(case.folder / "empty", 0, buffers_of(1))])
        with pytest.raises(ReadError) as caught:
            ticket.wait()
        assert (caught.value.offset, caught.value.errno) == (0, None)

    def test_a_bad_sector(self, case):
        reader = case.reader(bad_offset=5000)
        path = case.folder / "a"
        good = ReadRequest(path, 0, buffers_of(2500, 2500))
        bad = ReadRequest(path, 3000, buffers_of(1000, 2000))
        reader.submit([good]).wait()
        ticket = reader.submit([bad])
        with pytest.raises(ReadError) as caught:
            ticket.wait()
        assert isinstance(caught.value, FlashMoEError)
        assert (caught.value.path, caught.value.errno) == (str(path), errno.EIO)
        assert 3000 <= caught.value.offset <= 5000
        assert os.strerror(errno.EIO) in str(caught.value)
        assert joined(good.buffers) == CONTENT[:5000]
        # A reader outlives a failed batch.
        after = ReadRequest(path, 5001, buffers_of(3))
        reader.submit([after]).wait()
        assert joined(after.buffers) == CONTENT[5001:5004]
        reader.close()

    def test_the_first_failed_request_is_the_one_raised(self, case):
        reader = case.reader(bad_offset=5000)
        requests = [ReadRequest(case.folder / "a", i, buffers_of(10)) for i in range(20)]
        requests[7] = ReadRequest(case.folder / "a", 49_995, buffers_of(10))
        requests[12] = ReadRequest(case.folder / "b", 4995, buffers_of(10))
        with pytest.raises(ReadError) as caught:
            reader.submit(requests).wait()
        assert (caught.value.offset, caught.value.errno) == (50_000, None)
        with pytest.raises(ReadError) as caught:
            reader.submit(requests[::-1]).wait()
        assert (caught.value.path, caught.value.errno) == (str(case.folder / "b"), errno.EIO)
        reader.close()

    def test_a_missing_file(self, case, reader):
        path = case.folder / "none"
        buffers = buffers_of(10)
        good = ReadRequest(case.folder / "a", 0, buffers)
        with pytest.raises(ReadError) as caught:
            reader.submit([good, ReadRequest(path, 77, buffers_of(1))])
        error = caught.value
        assert (error.path, error.offset, error.errno) == (str(path), 77, errno.ENOENT)
        # Nobody waits for the rest of that batch, so nobody may be writing to it.
        for buffer in buffers:
            buffer[:] = ONES * len(buffer)
        reader.close()
        assert joined(buffers) == ONES * 10

    def test_after_a_failure_nobody_writes_to_a_buffer(self, case):
        reader = case.reader(bad_offset=0)
        requests = [
            ReadRequest(case.folder / "a", i * 1000, buffers_of(400, 600)) for i in range(30)
        ]
        with pytest.raises(ReadError):
            reader.submit(requests).wait()
        for request in requests:
            for buffer in request.buffers:
                buffer[:] = ONES * len(buffer)
        reader.close()
        assert {joined(request.buffers) for request in requests} == {ONES * 1000}

    def test_counters_count_what_was_read_whole(self, case):
        reader = case.reader(bad_offset=5000)
        assert (reader.counters.reads, reader.counters.bytes) == (0, 0)
        requests = [ReadRequest(case.folder / "a", at, buffers_of(70, 30)) for at in (0, 4950, 9)]
        with pytest.raises(ReadError):
            reader.submit(requests).wait()
        assert (reader.counters.reads, reader.counters.bytes) == (2, 200)
        assert reader.counters.seconds >= 0
        reader.close()

    def test_a_closed_reader_refuses(self, case, reader):
        reader.submit([ReadRequest(case.folder / "a", 0, buffers_of(1))]).wait()
        reader.close()
        reader.close()
        buffers = buffers_of(10)
        for name in ("a", "b", "none"):
            with pytest.raises(ReadError, match="the reader is closed"):
                reader.submit([ReadRequest(case.folder / name, 0, buffers)])
        assert joined(buffers) == ONES * 10

    def test_closing_waits_for_what_is_running(self, case, reader):
        requests = [ReadRequest(case.folder / "a", i, buffers_of(100)) for i in range(20)]
        ticket = reader.submit(requests)
        reader.close()
        for i, request in enumerate(requests):
            assert joined(request.buffers) == CONTENT[i : i + 100]
        ticket.wait()

    @settings(max_examples=50)
    @given(
        st.integers(0, 49_000),
        st.lists(st.lists(st.integers(0, 90), max_size=9), min_size=1, max_size=6),
    )
    def test_any_split(self, case, offset, splits):
        reader = case.reader(threads=2)
        requests = [ReadRequest(case.folder / "a", offset, buffers_of(*sizes)) for sizes in splits]
        reader.submit(requests).wait()
        reader.close()
        for request in requests:
            assert joined(request.buffers) == CONTENT[offset : offset + request.nbytes]


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
        assert len(open_descriptors() - before) == 5
        reader.close()
        assert open_descriptors() <= before

    def test_threads_are_given_back(self, file_case):
        before = set(threading.enumerate())
        reader = file_case.reader(threads=3)
        path = file_case.folder / "a"
        reader.submit([ReadRequest(path, i, buffers_of(9)) for i in range(30)]).wait()
        assert len(set(threading.enumerate()) - before) <= 3
        reader.close()
        assert set(threading.enumerate()) <= before

    def test_a_folder(self, file_case):
        reader = file_case.reader()
        with pytest.raises(ReadError) as caught:
            reader.submit([ReadRequest(file_case.folder, 0, buffers_of(1))]).wait()
        assert caught.value.errno == errno.EISDIR
        reader.close()


def test_requests_run_at_the_same_time(tmp_path):
    """Four threads meet inside preadv: with fewer, the barrier would break."""
    (tmp_path / "a").write_bytes(CONTENT)
    barrier = threading.Barrier(4, timeout=5)

    def preadv(descriptor, buffers, offset):
        barrier.wait()
        return os.preadv(descriptor, buffers, offset)

    reader = ThreadReader(4, preadv)
    requests = [ReadRequest(tmp_path / "a", i, buffers_of(10)) for i in range(8)]
    reader.submit(requests).wait()
    reader.close()
    assert [joined(request.buffers) for request in requests] == [
        CONTENT[i : i + 10] for i in range(8)
    ]


def test_one_call_per_request(tmp_path):
    """A record's components and the padding between them are one read."""
    (tmp_path / "a").write_bytes(CONTENT)
    calls = []

    def preadv(descriptor, buffers, offset):
        calls.append((offset, [len(buffer) for buffer in buffers]))
        return os.preadv(descriptor, buffers, offset)

    reader = ThreadReader(1, preadv)
    reader.submit([ReadRequest(tmp_path / "a", 9, buffers_of(4, 0, 5, 6))]).wait()
    reader.close()
    assert calls == [(9, [4, 5, 6])]


def test_an_error_that_is_no_read_error_passes(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)

    def preadv(descriptor, buffers, offset):
        raise MemoryError("injected")

    reader = ThreadReader(1, preadv)
    with pytest.raises(MemoryError, match="injected"):
        reader.submit([ReadRequest(tmp_path / "a", 0, buffers_of(1))]).wait()
    reader.close()
