"""Lanes: so many pieces at a time for each, with the threads and priorities of one reader."""

import contextlib
import os
import threading
import time

import pytest

from flashmoe.base.errors import OptionError, ReadError
from flashmoe.io.depth import Depth
from flashmoe.io.mapped import MmapReader
from flashmoe.io.reader import Priority, ReadRequest
from tests.support.reader_cases import CONTENT, POOLS, buffers_of, joined
from tests.support.readers import MemoryReader

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking with threads


class Watch:
    """A preadv that takes a moment, notes where it read, and how much of it at once.

    Offsets from 40,000 on wait for `open`.
    """

    def __init__(self):
        self.offsets = []
        self.running = {False: 0, True: 0}
        self.most = {False: 0, True: 0}
        self.open = threading.Event()
        self.lock = threading.Lock()

    def __call__(self, descriptor, buffers, offset):
        far = offset >= 40_000
        with self.lock:
            self.offsets.append(offset)
            self.running[far] += 1
            self.most[far] = max(self.most[far], self.running[far])
        if far:
            assert self.open.wait(10)
        time.sleep(0.002)
        count = os.preadv(descriptor, buffers, offset)
        with self.lock:
            self.running[far] -= 1
        return count


@pytest.fixture
def watch():
    return Watch()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(params=list(POOLS))
def pool(request):
    return POOLS[request.param]


def near(path, count=8, first=0):
    return [ReadRequest(path, first + i * 100, buffers_of(100)) for i in range(count)]


def far(path, count=8):
    return [ReadRequest(path, 40_000 + i * 100, buffers_of(100)) for i in range(count)]


def whole(requests):
    return all(joined(r.buffers) == CONTENT[r.offset : r.offset + r.nbytes] for r in requests)


@pytest.mark.parametrize(("threads", "most"), [(1, 1), (2, 2), (6, 6)])
def test_so_many_at_a_time(pool, watch, path, threads, most):
    watch.open.set()
    with contextlib.closing(pool(3, watch)) as reader:
        lane = reader.lane(Depth(threads))
        batches = [far(path, 4) for _ in range(4)] + [near(path, 4) for _ in range(4)]
        tickets = [lane.submit(batch) for batch in batches[:4]]
        tickets += [reader.submit(batch) for batch in batches[4:]]
        for ticket in tickets:
            ticket.wait()
        assert all(map(whole, batches))
        assert 1 <= watch.most[True] <= most
        assert 1 <= watch.most[False] <= 3
        # Enough of everything was waiting.
        assert watch.most[True] == most or most > 3
        assert lane.counters == reader.counters
        assert reader.counters.reads == 32


def test_pieces_of_its_own(pool, watch, path):
    with contextlib.closing(pool(2, watch)) as reader:
        for lane, pieces in ((reader, 1), (reader.lane(Depth(2, 4096)), 4)):
            request = ReadRequest(path, 0, buffers_of(16_384))
            lane.submit([request]).wait()
            assert whole([request])
            assert len(watch.offsets) == pieces
            watch.offsets.clear()


def test_a_full_lane_keeps_nobody_else_waiting(pool, watch, path):
    with contextlib.closing(pool(2, watch)) as reader:
        lane = reader.lane(Depth(1))
        slow, quick = far(path), near(path)
        ticket = lane.submit(slow)
        reader.submit(quick).wait()
        assert whole(quick)
        assert not ticket.done()
        assert watch.running[True] == 1
        watch.open.set()
        assert lane.wait_any([ticket]) == 0
        ticket.wait()
        assert whole(slow)


def test_priorities_hold_across_lanes(pool, watch, path):
    with contextlib.closing(pool(3, watch)) as reader:
        lane = reader.lane(Depth(1))
        slow, quick = far(path, 3), near(path, 3)
        demand = lane.submit(slow)
        prefetch = reader.submit(quick, Priority.PREFETCH)
        time.sleep(0.05)
        # Two threads have nothing to do, and still no prefetch begins.
        assert watch.offsets == [40_000]
        watch.open.set()
        demand.wait()
        prefetch.wait()
        # They may once the last demanded piece has been taken.
        assert watch.offsets[:2] == [40_000, 40_100]
        assert whole(slow)
        assert whole(quick)


def test_what_is_dropped_lets_others_begin(pool, watch, path):
    with contextlib.closing(pool(3, watch)) as reader:
        lane = reader.lane(Depth(1))
        demand = lane.submit(far(path, 3))
        quick = near(path, 3)
        prefetch = reader.submit(quick, Priority.PREFETCH)
        time.sleep(0.02)
        assert demand.cancel() == 2
        prefetch.wait()
        assert whole(quick)
        watch.open.set()
        lane.drain()
        assert demand.done()


def test_closing_reads_what_was_submitted(pool, watch, path):
    watch.open.set()
    reader = pool(4, watch)
    lane = reader.lane(Depth(1))
    requests = far(path, 20)
    ticket = lane.submit(requests)
    lane.close()
    reader.close()
    ticket.wait()
    assert whole(requests)
    with pytest.raises(ReadError, match="closed"):
        lane.submit(near(path))


def test_a_child_process_has_the_lanes(pool, path):
    with contextlib.closing(pool(2)) as reader:
        lane = reader.lane(Depth(1, 4096))
        lane.submit(near(path)).wait()
        child = os.fork()
        if child == 0:
            requests = far(path)
            lane.submit(requests).wait()
            reader.submit(near(path)).wait()
            os._exit(0 if whole(requests) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_memory_maps_have_lanes(path):
    with contextlib.closing(MmapReader(2)) as reader:
        requests = near(path)
        reader.lane(Depth(1, 4096)).submit(requests).wait()
        assert whole(requests)


def test_a_reader_without_depth_is_its_own_lane(path):
    reader = MemoryReader({path: CONTENT})
    assert reader.lane(Depth(3)) is reader


def test_depths_out_of_range():
    with pytest.raises(OptionError, match="threads"):
        Depth(0)
