"""One contract, every reader through it: bytes and errors."""

import errno
import os
import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.base.errors import FlashMoEError, ReadCancelled, ReadError
from flashmoe.io.reader import Priority, ReadRequest, Scatter
from tests.support.reader_cases import CASES, CONTENT, ONES, Case, buffers_of, joined


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    case = Case(request.param, tmp_path_factory.mktemp("readers"))
    case.write("a", CONTENT)
    case.write("b", CONTENT[::-1])
    case.write("empty", b"")
    return case


@pytest.fixture
def reader(case):
    reader = case.reader()
    yield reader
    reader.close()


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

    def test_a_destination_that_is_kept(self, case, reader):
        scatter = Scatter(buffers_of(70, 0, 30))
        for offset in (5, 4000, 49_900):
            request = ReadRequest(case.folder / "a", offset, scatter)
            assert request.nbytes == scatter.nbytes == 100
            reader.submit([request], Priority.PREFETCH).wait()
            assert joined(scatter) == CONTENT[offset : offset + 100]
        assert (len(scatter), len(scatter[1]), scatter[0][0]) == (3, 0, CONTENT[49_900])

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
        # Reads past the page cache cannot have the rest of its block either.
        bad_block = 8192
        reader = case.reader(bad_offset=bad_block)
        path = case.folder / "a"
        good = ReadRequest(path, 0, buffers_of(2500, 2500))
        bad = ReadRequest(path, 6192, buffers_of(1000, 2000))
        reader.submit([good]).wait()
        ticket = reader.submit([bad])
        with pytest.raises(ReadError) as caught:
            ticket.wait()
        assert isinstance(caught.value, FlashMoEError)
        assert (caught.value.path, caught.value.errno) == (str(path), errno.EIO)
        assert 6192 <= caught.value.offset <= bad_block
        assert os.strerror(errno.EIO) in str(caught.value)
        assert joined(good.buffers) == CONTENT[:5000]
        # A reader outlives a failed batch.
        after = ReadRequest(path, bad_block + 4097, buffers_of(3))
        reader.submit([after]).wait()
        assert joined(after.buffers) == CONTENT[bad_block + 4097 :][:3]
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
        # A closed reader keeps them.
        assert (reader.counters.reads, reader.counters.bytes) == (2, 200)

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

    def test_tickets(self, case, reader):
        requests = [ReadRequest(case.folder / "a", i, buffers_of(1000)) for i in range(4)]
        tickets = [reader.submit(requests[:2]), reader.submit(requests[2:], Priority.PREFETCH)]
        waiting = [0, 1]
        while waiting:
            ended = waiting[reader.wait_any([tickets[i] for i in waiting])]
            assert tickets[ended].done()
            tickets[ended].wait()
            for i in (0, 1):
                begin = 2 * ended + i
                assert joined(requests[begin].buffers) == CONTENT[begin:][:1000]
            waiting.remove(ended)
        assert reader.wait_any(tickets) in (0, 1)
        assert [ticket.cancel() for ticket in tickets] == [0, 0]
        assert reader.submit([]).done()
        with pytest.raises(ValueError, match="no ticket"):
            reader.wait_any([])

    def test_a_failed_ticket_has_ended(self, case, reader):
        bad = reader.submit([ReadRequest(case.folder / "empty", 3, buffers_of(1))])
        assert reader.wait_any([bad]) == 0
        assert bad.done()
        for _ in range(2):
            with pytest.raises(ReadError, match="too early"):
                bad.wait()

    def test_cancelling(self, case, reader):
        """Whatever has begun by then: what is not dropped is whole, the rest untouched."""
        for _ in range(20):
            requests = [ReadRequest(case.folder / "a", i, buffers_of(900)) for i in range(30)]
            ticket = reader.submit(requests, Priority.PREFETCH)
            dropped = ticket.cancel()
            if dropped:
                with pytest.raises(ReadCancelled, match="cancelled before it began"):
                    ticket.wait()
            else:
                ticket.wait()
            assert ticket.done()
            whole = [joined(r.buffers) == CONTENT[r.offset :][:900] for r in requests]
            assert sum(whole) == 30 - dropped
            if not case.name.startswith("faulty"):
                untouched = {
                    joined(r.buffers) for r, w in zip(requests, whole, strict=True) if not w
                }
                assert untouched <= {ONES * 900}

    def test_draining(self, case, reader):
        requests = [ReadRequest(case.folder / "a", i, buffers_of(900)) for i in range(30)]
        tickets = [reader.submit([request]) for request in requests]
        reader.drain()
        assert all(ticket.done() for ticket in tickets)
        for request in requests:
            request.buffers[0][:] = ONES * 900
        again = ReadRequest(case.folder / "a", 7, buffers_of(900))
        reader.submit([again]).wait()
        reader.close()
        reader.drain()
        assert joined(again.buffers) == CONTENT[7:907]
        assert {joined(request.buffers) for request in requests} == {ONES * 900}

    @settings(max_examples=25)
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
