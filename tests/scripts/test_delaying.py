"""The emulated disk: its rate, its order, and what it does to who waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashmoe.base.errors import ReadCancelled, ReadError
from flashmoe.io.reader import Priority, ReadRequest
from flashmoe.io.threads import ThreadReader
from tests.support.delaying import DelayingReader
from tests.support.reader_cases import CONTENT, buffers_of, joined

Requests = list[ReadRequest]


@pytest.fixture
def requests(tmp_path: Path) -> Requests:
    """Twelve of 1,000 bytes, told apart by their offsets."""
    path = tmp_path / "a"
    path.write_bytes(CONTENT)
    return [ReadRequest(path, i, buffers_of(1000)) for i in range(12)]


@pytest.fixture
def made() -> Iterator[Callable[..., DelayingReader]]:
    readers = []

    def make(**options: object) -> DelayingReader:
        readers.append(DelayingReader(ThreadReader(4), **options))  # type: ignore[arg-type]
        return readers[-1]

    yield make
    for reader in readers:
        reader.close()


def whole(request: ReadRequest) -> bool:
    return joined(request.buffers) == CONTENT[request.offset :][: request.nbytes]


def test_it_is_as_slow_as_it_is_told_to_be(
    made: Callable[..., DelayingReader], requests: Requests
) -> None:
    reader = made(bytes_per_second=50_000)
    started = time.perf_counter()
    tickets = [reader.submit(requests[:6]), reader.submit(requests[6:])]
    tickets[0].wait()
    half = time.perf_counter() - started
    tickets[1].wait()
    assert half >= 0.12
    assert time.perf_counter() - started >= 0.24
    assert all(map(whole, requests))
    # Idle time is not saved up.
    time.sleep(0.1)
    started = time.perf_counter()
    reader.submit(requests[:6]).wait()
    assert time.perf_counter() - started >= 0.12


def test_demand_comes_first_and_puts_a_prefetch_off(
    made: Callable[..., DelayingReader], requests: Requests
) -> None:
    reader = made(bytes_per_second=5_000)
    prefetches = [reader.submit([request], Priority.PREFETCH) for request in requests[:3]]
    while not reader.begun[Priority.PREFETCH]:
        time.sleep(0.001)
    demand = reader.submit(requests[3:5])
    assert reader.wait_any([*prefetches, demand]) == 3
    assert not prefetches[0].done()
    assert reader.begun == {Priority.PREFETCH: 1, Priority.DEMAND: 2}
    assert [ticket.cancel() for ticket in prefetches] == [0, 1, 1]
    assert reader.cancelled == {Priority.PREFETCH: 2}
    prefetches[0].wait()
    with pytest.raises(ReadCancelled):
        prefetches[1].wait()
    assert [whole(request) for request in requests[:5]] == [True, False, False, True, True]


def test_requests_end_in_any_order(made: Callable[..., DelayingReader], requests: Requests) -> None:
    reader = made(delays=(0.0, 0.01, 0.03), seed=1)
    waiting = {i: reader.submit([request]) for i, request in enumerate(requests)}
    order = []
    while waiting:
        keys = list(waiting)
        order.append(keys[reader.wait_any([waiting[key] for key in keys])])
        del waiting[order[-1]]
    assert sorted(order) == list(range(12)) != order
    assert all(map(whole, requests))


def test_faults(made: Callable[..., DelayingReader], requests: Requests) -> None:
    reader = made(fault_chance=0.5, seed=2)
    failed = 0
    for request in requests:
        try:
            reader.submit([request]).wait()
        except ReadError as error:
            assert (error.path, error.offset) == (str(request.path), request.offset)
            failed += 1
    assert 0 < failed < 12
    assert reader.counters.reads == 12 - failed


def test_interrupts(made: Callable[..., DelayingReader], requests: Requests) -> None:
    reader = made(interrupt_chance=1.0, bytes_per_second=100_000)
    ticket = reader.submit(requests)
    with pytest.raises(KeyboardInterrupt):
        reader.wait_any([ticket])
    assert ticket.done()
    assert reader.cancelled[Priority.DEMAND] + reader.begun[Priority.DEMAND] == 12
    reader.drain()
