"""A reader behind an emulated disk: of a given rate, late at random, failing on demand.

It wraps any other reader, whose bytes it delivers.
"""

from __future__ import annotations

import errno
import heapq
import math
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flashmoe.base.errors import ReadCancelled, ReadError
from flashmoe.io.reader import Priority, ReadCounters, Reader, ReadRequest, Ticket


@dataclass(eq=False)
class Job:
    """A request of a batch. `left` bytes of it have not been served yet."""

    request: ReadRequest
    priority: Priority
    left: float
    submitted: float
    inner: Ticket | None = None
    ended: bool = False
    dropped: bool = False
    error: ReadError | None = None


class DelayingReader(Reader):
    """Serves one request at a time at `bytes_per_second`, whatever `inner` could do.

    Demanded requests come first: one that is submitted while a prefetch is served puts that off.
    A request that was served ends after one of `delays`, drawn for each, so that requests end in
    another order than they were begun in. `fault_chance` of them fail with EIO, and
    `interrupt_chance` of waits are interrupted by a KeyboardInterrupt.

    `begun` and `cancelled` count requests by priority.
    """

    def __init__(
        self,
        inner: Reader,
        *,
        bytes_per_second: float = math.inf,
        delays: Sequence[float] = (0.0,),
        fault_chance: float = 0.0,
        interrupt_chance: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.bytes_per_second = bytes_per_second
        self.begun: Counter[Priority] = Counter()
        self.cancelled: Counter[Priority] = Counter()
        self._inner = inner
        self._delays = delays
        self._fault_chance = fault_chance
        self._interrupt_chance = interrupt_chance
        self._draw = random.Random(seed)
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._ended = threading.Condition(self._lock)
        self._waiting: dict[Priority, deque[Job]] = {priority: deque() for priority in Priority}
        # Begun and not served, of each priority; served, and when they may end.
        self._serving: dict[Priority, Job | None] = dict.fromkeys(Priority)
        self._held: list[tuple[float, int, Job]] = []
        self._open = 0
        # Until when the disk's time is spent.
        self._spent = 0.0
        self._paths: set[Path] = set()
        self._counters = ReadCounters()
        self._refusing = self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="emulated-disk", daemon=True)
        self._thread.start()

    @property
    def counters(self) -> ReadCounters:
        mine = self._counters
        return replace(
            self._inner.counters, reads=mine.reads, bytes=mine.bytes, seconds=mine.seconds
        )

    def submit(
        self, requests: Sequence[ReadRequest], priority: Priority = Priority.DEMAND
    ) -> Ticket:
        with self._lock:
            if self._refusing and requests:
                first = requests[0]
                raise ReadError(str(first.path), first.offset, "the reader is closed")
            # Files that cannot be opened are known before anything is read.
            new = [request for request in requests if request.path not in self._paths]
            self._inner.submit([replace(request, buffers=()) for request in new]).wait()
            self._paths.update(request.path for request in new)
            now = time.perf_counter()
            jobs = [Job(request, priority, request.nbytes, now) for request in requests]
            self._waiting[priority].extend(jobs)
            self._open += len(jobs)
            self._work.notify()
        return DelayedTicket(self, jobs)

    def wait_any(self, tickets: Sequence[Ticket]) -> int:
        if not tickets:
            raise ValueError("there is no ticket to wait for")
        self.outlasting(lambda: any(ticket.done() for ticket in tickets), tickets)
        return next(i for i, ticket in enumerate(tickets) if ticket.done())

    def mend(self) -> None:
        """Neither fail nor interrupt from now on."""
        self._fault_chance = self._interrupt_chance = 0.0

    def drain(self) -> None:
        with self._lock:
            for waiting in self._waiting.values():
                for job in list(waiting):
                    self.drop(job)
            self._ended.wait_for(lambda: not self._open)

    def close(self) -> None:
        with self._lock:
            self._refusing = True
            self._ended.wait_for(lambda: not self._open)
            self._stopping = True
            self._work.notify()
        self._thread.join()
        self._inner.close()

    def outlasting(self, ready: Callable[[], bool], tickets: Sequence[Ticket]) -> None:
        """Wait until it is so; when interrupted, cancel the tickets and wait for what runs."""
        try:
            with self._lock:
                if self._draw.random() < self._interrupt_chance:
                    raise KeyboardInterrupt
                self._ended.wait_for(ready)
        except BaseException:
            with self._lock:
                for ticket in tickets:
                    ticket.cancel()
                self._ended.wait_for(lambda: all(ticket.done() for ticket in tickets))
            raise

    def drop(self, job: Job) -> int:
        """1 when the job had not begun; it never will."""
        with self._lock:
            if job.inner is not None or job.ended:
                return 0
            self._waiting[job.priority].remove(job)
            self.cancelled[job.priority] += 1
            job.dropped = True
            self._end(job)
            return 1

    def _serve(self) -> None:
        while True:
            with self._lock:
                job = self._next_served()
                if job is None:
                    return
            # Not under the lock: the wrapped reader may be slow itself.
            assert job.inner is not None
            try:
                job.inner.wait()
            except ReadError as error:
                job.error = error
            with self._lock:
                if job.error is None and self._draw.random() < self._fault_chance:
                    path, offset = str(job.request.path), job.request.offset
                    job.error = ReadError(path, offset, os.strerror(errno.EIO), errno.EIO)
                held = (time.perf_counter() + self._draw.choice(self._delays), id(job), job)
                heapq.heappush(self._held, held)

    def _next_served(self) -> Job | None:
        """Wait for the next request whose bytes the disk has had the time for; None to stop."""
        while True:
            now = time.perf_counter()
            while self._held and self._held[0][0] <= now:
                self._end(heapq.heappop(self._held)[2])
            job = self._begin()
            served = math.inf
            if job is not None:
                served = max(self._spent, job.submitted) + job.left / self.bytes_per_second
                if served <= now:
                    self._spent = served
                    self._serving[job.priority] = None
                    return job
                if self.bytes_per_second < math.inf:
                    begin = max(self._spent, job.submitted)
                    job.left -= max(0.0, now - begin) * self.bytes_per_second
                    self._spent = max(now, begin)
            elif self._stopping:
                return None
            wake = min(served, self._held[0][0] if self._held else math.inf)
            self._work.wait(None if wake == math.inf else max(0.0, wake - now))

    def _begin(self) -> Job | None:
        """The request to serve now."""
        for priority in Priority:
            if self._serving[priority] is None and self._waiting[priority]:
                job = self._waiting[priority].popleft()
                job.inner = self._inner.submit([job.request], priority)
                self.begun[priority] += 1
                self._serving[priority] = job
            if self._serving[priority] is not None:
                return self._serving[priority]
        return None

    def _end(self, job: Job) -> None:
        job.ended = True
        self._open -= 1
        if job.error is None and not job.dropped:
            mine = self._counters
            self._counters = replace(
                mine,
                reads=mine.reads + 1,
                bytes=mine.bytes + job.request.nbytes,
                seconds=mine.seconds + time.perf_counter() - job.submitted,
            )
        self._ended.notify_all()


class DelayedTicket(Ticket):
    """A batch."""

    def __init__(self, reader: DelayingReader, jobs: Sequence[Job]) -> None:
        self._reader = reader
        self._jobs = jobs

    def done(self) -> bool:
        return all(job.ended for job in self._jobs)

    def cancel(self) -> int:
        return sum(self._reader.drop(job) for job in self._jobs)

    def wait(self) -> None:
        self._reader.outlasting(self.done, [self])
        for job in self._jobs:
            if job.error is not None:
                raise job.error
        for job in self._jobs:
            if job.dropped:
                raise ReadCancelled(str(job.request.path), job.request.offset)
