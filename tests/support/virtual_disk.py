"""A disk of a given rate in a time that only tests move on: nothing waits, and nothing varies."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from flashmoe.base.errors import ReadCancelled
from flashmoe.io.reader import Priority, ReadCounters, Reader, ReadRequest, Ticket


@dataclass
class Time:
    """Seconds since the beginning; whoever computes adds to it."""

    now: float = 0.0


@dataclass(eq=False)
class Job:
    """A request; `left` bytes have not been served yet."""

    request: ReadRequest
    priority: Priority
    submitted: float
    left: float
    begun: bool = False
    ended: bool = False
    dropped: bool = False


class VirtualDisk(Reader):
    """Serves one request at a time, demanded ones first, its bytes coming from `inner`."""

    def __init__(self, inner: Reader, bytes_per_second: float, time: Time) -> None:
        self._inner = inner
        self._rate = bytes_per_second
        self._time = time
        self._spent = 0.0
        self._jobs: dict[Priority, deque[Job]] = {priority: deque() for priority in Priority}

    @property
    def counters(self) -> ReadCounters:
        return self._inner.counters

    def submit(
        self, requests: Sequence[ReadRequest], priority: Priority = Priority.DEMAND
    ) -> Ticket:
        self.advance()
        now = self._time.now
        jobs = [Job(request, priority, now, request.nbytes) for request in requests]
        self._jobs[priority].extend(jobs)
        self.advance()
        return VirtualTicket(self, jobs)

    def wait_any(self, tickets: Sequence[Ticket]) -> int:
        while True:
            for i, ticket in enumerate(tickets):
                if ticket.done():
                    return i
            self.wait_for_next()

    def drain(self) -> None:
        for jobs in self._jobs.values():
            for job in [job for job in jobs if not job.begun]:
                self.drop(job)
        while any(self._jobs.values()):
            self.wait_for_next()

    def close(self) -> None:
        self.drain()
        self._inner.close()

    def advance(self) -> None:
        """Serve until now."""
        now = self._time.now
        while (job := self._current()) is not None:
            job.begun = True
            begin = max(self._spent, job.submitted)
            end = begin + job.left / self._rate
            if end > now:
                job.left -= max(0.0, now - begin) * self._rate
                break
            self._spent = end
            self._inner.submit([job.request]).wait()
            self._jobs[job.priority].popleft()
            job.ended = True
        self._spent = max(self._spent, now)

    def wait_for_next(self) -> None:
        """Let the time pass until one more request has ended."""
        job = self._current()
        assert job is not None, "nothing is being read"
        end = max(self._spent, job.submitted) + job.left / self._rate
        self._time.now = max(self._time.now, end)
        self.advance()

    def drop(self, job: Job) -> int:
        """1 when the job had not begun; it never will."""
        if job.begun:
            return 0
        self._jobs[job.priority].remove(job)
        job.ended = job.dropped = job.begun = True
        return 1

    def _current(self) -> Job | None:
        return next((self._jobs[p][0] for p in Priority if self._jobs[p]), None)


class VirtualTicket(Ticket):
    """A batch."""

    def __init__(self, disk: VirtualDisk, jobs: Sequence[Job]) -> None:
        self._disk = disk
        self._jobs = jobs

    def done(self) -> bool:
        self._disk.advance()
        return all(job.ended for job in self._jobs)

    def cancel(self) -> int:
        self._disk.advance()
        return sum(self._disk.drop(job) for job in self._jobs)

    def wait(self) -> None:
        while not self.done():
            self._disk.wait_for_next()
        for job in self._jobs:
            if job.dropped:
                raise ReadCancelled(str(job.request.path), job.request.offset)
