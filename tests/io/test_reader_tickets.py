"""Order, cancelling, interrupts, counters and forks, where a test says when a read may go on."""

import contextlib
import os
import random
import signal
import threading
import time

import pytest

from flashmoe.base.errors import ReadCancelled, ReadError
from flashmoe.io.reader import Priority, ReadRequest
from tests.support.reader_cases import CONTENT, ONES, POOLS, buffers_of, joined

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking with threads


class Gate:
    """A preadv that waits until it is opened, and notes where it was asked to read."""

    def __init__(self):
        self.offsets = []
        self.open = threading.Event()
        self.reached = threading.Event()

    def __call__(self, descriptor, buffers, offset):
        self.offsets.append(offset)
        self.reached.set()
        assert self.open.wait(10)
        return os.preadv(descriptor, buffers, offset)


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture(params=list(POOLS))
def reader(request, gate):
    """One thread, which waits at the gate."""
    reader = POOLS[request.param](1, gate)
    yield reader
    gate.open.set()
    reader.close()


@pytest.fixture
def requests(tmp_path):
    """Ten small ones, told apart by their offsets 0 to 9."""
    path = tmp_path / "a"
    path.write_bytes(CONTENT)
    return [ReadRequest(path, i, buffers_of(10)) for i in range(10)]


def whole(request):
    return joined(request.buffers) == CONTENT[request.offset :][: request.nbytes]


def untouched(request):
    return joined(request.buffers) == ONES * request.nbytes


class TestPriority:
    def test_demand_overtakes_waiting_prefetch(self, reader, gate, requests):
        prefetch = reader.submit(requests[:3], Priority.PREFETCH)
        gate.reached.wait(10)
        more = reader.submit(requests[3:5], Priority.PREFETCH)
        demand = reader.submit(requests[5:7])
        later = reader.submit(requests[7:9], Priority.DEMAND)
        assert not demand.done()
        gate.open.set()
        for ticket in (prefetch, more, demand, later):
            ticket.wait()
        assert gate.offsets == [0, 5, 6, 7, 8, 1, 2, 3, 4]

    def test_prefetch_overtakes_waiting_warm_starts(self, reader, gate, requests):
        first = reader.submit(requests[:2], Priority.WARM_START)
        gate.reached.wait(10)
        more = reader.submit(requests[2:4], Priority.WARM_START)
        prefetch = reader.submit(requests[4:6], Priority.PREFETCH)
        demand = reader.submit(requests[6:7])
        gate.open.set()
        for ticket in (first, more, prefetch, demand):
            ticket.wait()
        assert gate.offsets == [0, 6, 4, 5, 1, 2, 3]

    def test_demand_overtakes_the_pieces_of_a_large_prefetch(self, reader, gate, tmp_path):
        path = tmp_path / "large"
        path.write_bytes(bytes(4 << 20))
        prefetch = reader.submit([ReadRequest(path, 0, buffers_of(4 << 20))], Priority.PREFETCH)
        gate.reached.wait(10)
        demand = reader.submit([ReadRequest(path, 5, buffers_of(10))])
        gate.open.set()
        demand.wait()
        prefetch.wait()
        assert gate.offsets == [0, 5, 1 << 20, 2 << 20, 3 << 20]


class TestCancel:
    def test_what_has_begun_goes_on(self, reader, gate, requests):
        ticket = reader.submit(requests[:4])
        gate.reached.wait(10)
        assert ticket.cancel() == 3
        assert ticket.cancel() == 0
        assert not ticket.done()
        gate.open.set()
        for _ in range(2):
            with pytest.raises(ReadCancelled) as caught:
                ticket.wait()
            assert caught.value.offset == 1
        assert ticket.done()
        assert gate.offsets == [0]
        assert whole(requests[0])
        assert all(untouched(request) for request in requests[1:4])
        assert (reader.counters.reads, reader.counters.bytes) == (1, 10)

    def test_what_has_not_begun_ends_at_once(self, reader, gate, requests):
        first = reader.submit(requests[:1])
        gate.reached.wait(10)
        second = reader.submit(requests[1:4], Priority.PREFETCH)
        third = reader.submit(requests[4:5])
        assert second.cancel() == 3
        assert second.done()
        with pytest.raises(ReadCancelled):
            second.wait()
        assert reader.wait_any([first, second]) == 1
        gate.open.set()
        first.wait()
        third.wait()
        assert second.cancel() == first.cancel() == 0
        assert gate.offsets == [0, 4]

    def test_a_request_that_has_begun_is_read_whole(self, reader, gate, tmp_path):
        path = tmp_path / "large"
        content = random.Random(2).randbytes(3 << 20)
        path.write_bytes(content)
        large = [ReadRequest(path, i, buffers_of((3 << 20) - i)) for i in (0, 1)]
        ticket = reader.submit(large)
        gate.reached.wait(10)
        assert ticket.cancel() == 1
        gate.open.set()
        with pytest.raises(ReadCancelled):
            ticket.wait()
        assert joined(large[0].buffers) == content
        assert untouched(large[1])

    def test_a_failure_comes_before_what_was_dropped(self, reader, gate, requests):
        bad = ReadRequest(requests[0].path, 50_000, buffers_of(1))
        ticket = reader.submit([bad, *requests])
        gate.reached.wait(10)
        assert ticket.cancel() == 10
        gate.open.set()
        with pytest.raises(ReadError, match="too early"):
            ticket.wait()

    def test_draining_waits_for_what_runs(self, reader, gate, requests):
        tickets = [reader.submit([request], Priority(i % 3)) for i, request in enumerate(requests)]
        gate.reached.wait(10)
        threading.Timer(0.1, gate.open.set).start()
        reader.drain()
        assert gate.open.is_set()
        assert all(ticket.done() for ticket in tickets)
        assert [whole(request) for request in requests] == [True] + [False] * 9
        tickets[0].wait()
        with pytest.raises(ReadCancelled):
            tickets[5].wait()
        reader.submit(requests[5:6]).wait()


@contextlib.contextmanager
def interrupted(gate, times=1):
    """Ctrl-C while the block runs, and only when that was noticed, the gate opens."""
    noticed = threading.Semaphore(0)

    def notice(number, frame):
        noticed.release()
        raise KeyboardInterrupt

    def press():
        gate.reached.wait(10)
        for _ in range(times):
            time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)
            assert noticed.acquire(timeout=10)
        time.sleep(0.02)
        gate.open.set()

    presser = threading.Thread(target=press)
    before = signal.signal(signal.SIGINT, notice)
    try:
        with pytest.raises(KeyboardInterrupt):
            presser.start()
            yield
        assert gate.open.is_set()
    finally:
        presser.join()
        signal.signal(signal.SIGINT, before)


class TestInterrupts:
    @pytest.mark.parametrize("times", [1, 2])
    def test_a_wait(self, reader, gate, requests, times):
        ticket = reader.submit(requests[:4])
        with interrupted(gate, times):
            ticket.wait()
        assert ticket.done()
        assert whole(requests[0])
        assert all(untouched(request) for request in requests[1:4])
        with pytest.raises(ReadCancelled):
            ticket.wait()
        reader.submit(requests[1:2]).wait()

    def test_waiting_for_any(self, reader, gate, requests):
        tickets = [reader.submit(requests[:2]), reader.submit(requests[2:4])]
        with interrupted(gate):
            reader.wait_any(tickets)
        assert all(ticket.done() for ticket in tickets)
        assert [whole(request) for request in requests[:4]] == [True, False, False, False]

    def test_draining(self, reader, gate, requests):
        ticket = reader.submit(requests[:2])
        gate.reached.wait(10)
        with interrupted(gate, 2):
            reader.drain()
        assert ticket.done()


class TestCounters:
    def test_seconds_and_depth(self, reader, gate, requests):
        assert reader.counters.busy_seconds == reader.counters.mean_queue_depth == 0
        gate.open.set()
        reader.submit(requests[:1]).wait()
        gate.open.clear()
        ticket = reader.submit(requests[1:4])
        time.sleep(0.05)
        before = reader.counters
        assert before.busy_seconds >= 0.05
        assert 1 <= before.mean_queue_depth <= 3
        time.sleep(0.05)
        gate.open.set()
        ticket.wait()
        idle = reader.counters
        assert (idle.reads, idle.bytes) == (4, 40)
        assert idle.busy_seconds >= idle.seconds >= 0.1
        assert 2 < idle.mean_queue_depth <= 3
        time.sleep(0.02)
        assert reader.counters == idle
        reader.close()
        assert reader.counters == idle


class TestForks:
    def test_a_child_reads_with_threads_of_its_own(self, reader, gate, requests):
        gate.open.set()
        reader.submit(requests[:2]).wait()
        gate.open.clear()
        gate.reached.clear()
        running = reader.submit(requests[2:4])
        gate.reached.wait(10)
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                gate.open = threading.Event()
                gate.open.set()
                assert running.done()
                assert running.cancel() == 0
                with pytest.raises(ReadCancelled):
                    running.wait()
                assert reader.wait_any([running]) == 0
                reader.drain()
                reader.submit(requests[4:8]).wait()
                assert all(map(whole, requests[4:8]))
                assert reader.counters.reads == 4
                del running
                reader.close()
                os._exit(0)
            os._exit(1)
        gate.open.set()
        running.wait()
        assert os.waitpid(child, 0)[1] == 0
        assert all(map(whole, requests[:4]))
        assert all(map(untouched, requests[4:]))
