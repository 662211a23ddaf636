"""A pool of Python threads that works through batches of requests, the most urgent first.

Knows nothing of how a piece is read; the native library has a pool of its own.
"""

from __future__ import annotations

import abc
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flashmoe.base.errors import ReadCancelled, ReadError
from flashmoe.io.depth import DEFAULT_THREADS, Depth, cut
from flashmoe.io.files import OpenFiles
from flashmoe.io.lanes import Lane
from flashmoe.io.reader import Priority, ReadCounters, Reader, ReadRequest, Ticket


@dataclass
class ReadJob:
    """One request of a batch."""

    request: ReadRequest
    descriptor: int
    pieces_left: int = 0
    dropped: bool = False
    # Where in the file the first piece that failed begins, and how it failed.
    failure: tuple[int, BaseException] | None = None


@dataclass(frozen=True)
class ReadPiece:
    """The file range begin .. end of a request; `first` is its request's first piece."""

    job: ReadJob
    begin: int
    end: int
    first: bool


# Reads a piece; every thread has its own.
Work = Callable[[ReadPiece], None]


class PooledReader(Reader):
    """A reader whose pieces, of `piece_bytes` at most, are read by `threads` threads.

    Raises OptionError for numbers out of range.
    """

    def __init__(
        self, files: OpenFiles, threads: int = DEFAULT_THREADS, piece_bytes: int | None = None
    ) -> None:
        self._files = files
        self._lanes = [Depth(threads, piece_bytes)]
        self._closed = False
        self._crew = _Crew(self._lanes, self._worker)

    def lane(self, depth: Depth) -> Reader:
        self._lanes.append(depth)
        return Lane(self, len(self._lanes) - 1)

    @abc.abstractmethod
    def _worker(self) -> Work:
        """What reads the pieces that one thread takes.

        It raises ReadError for bytes that cannot be read; other errors reach who waits.
        """

    @property
    def counters(self) -> ReadCounters:
        return self._crew.counters()

    def submit(
        self,
        requests: Sequence[ReadRequest],
        priority: Priority = Priority.DEMAND,
        lane: int = 0,
    ) -> Ticket:
        jobs = [
            ReadJob(request, self._files.descriptor(request.path, request.offset))
            for request in requests
        ]
        if self._crew.process != os.getpid():
            # Threads do not survive a fork, and its locks may be held forever.
            self._crew = _Crew(self._lanes, self._worker)
        most = self._lanes[lane].piece_of(sum(request.nbytes for request in requests))
        pieces = []
        for job in jobs:
            begin = job.request.offset
            parts = cut(begin, begin + job.request.nbytes, most)
            job.pieces_left = len(parts)
            pieces += [ReadPiece(job, *part, first=not i) for i, part in enumerate(parts)]
        return self._crew.submit(jobs, pieces, priority, lane)

    def wait_any(self, tickets: Sequence[Ticket]) -> int:
        return self._crew.wait_any(tickets)

    def drain(self) -> None:
        if self._crew.process == os.getpid():
            self._crew.drain()

    def close(self) -> None:
        self._files.refuse()
        if self._crew.process == os.getpid():
            self._crew.close()
        self._files.close()


@dataclass
class _Totals:
    reads: int = 0
    bytes: int = 0
    seconds: float = 0.0
    busy_seconds: float = 0.0
    # Requests not ended, their integral over time, and until when that is worked out.
    open: int = 0
    open_seconds: float = 0.0
    clock: float = field(default_factory=time.perf_counter)

    def add_open(self, change: int) -> None:
        now = time.perf_counter()
        if self.open:
            self.busy_seconds += now - self.clock
            self.open_seconds += (now - self.clock) * self.open
        self.clock = now
        self.open += change


class _Crew:
    """The threads and what they have to do. One lock guards all of it."""

    def __init__(self, lanes: Sequence[Depth], worker: Callable[[], Work]) -> None:
        self.process = os.getpid()
        # Lanes may be added to the list.
        self._lanes = lanes
        self._lane_running: Counter[int] = Counter()
        self._blocked = 0
        self._worker = worker
        self._lock = threading.Lock()
        self._work_waits = threading.Condition(self._lock)
        self._batch_ended = threading.Condition(self._lock)
        self._threads: list[threading.Thread] = []
        self._waiting: dict[Priority, deque[_Batch]] = {p: deque() for p in Priority}
        self._totals = _Totals()
        self._open_pieces = 0
        self._stopping = False

    def counters(self) -> ReadCounters:
        with self._lock:
            totals = self._totals
            totals.add_open(0)
            busy = totals.busy_seconds
            depth = totals.open_seconds / busy if busy else 0.0
            return ReadCounters(totals.reads, totals.bytes, totals.seconds, busy, depth)

    def submit(
        self, jobs: list[ReadJob], pieces: list[ReadPiece], priority: Priority, lane: int
    ) -> Ticket:
        batch = _Batch(self, jobs, pieces, lane)
        with self._lock:
            most_threads = max(depth.threads for depth in self._lanes)
            if self._stopping and jobs:
                raise ReadError(*_where(jobs[0]), "the reader is closed")
            self._open_pieces += len(pieces)
            while len(self._threads) < min(most_threads, self._open_pieces):
                name = f"flashmoe-read-{len(self._threads)}"
                thread = threading.Thread(target=self._run, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
            self._totals.reads += sum(not job.pieces_left for job in jobs)
            self._totals.add_open(sum(job.pieces_left > 0 for job in jobs))
            if pieces:
                self._waiting[priority].append(batch)
                self._work_waits.notify(len(pieces))
        return batch

    def wait_any(self, tickets: Sequence[Ticket]) -> int:
        if not tickets:
            raise ValueError("there is no ticket to wait for")
        ended: list[int] = []

        def look() -> bool:
            ended[:] = [i for i, ticket in enumerate(tickets) if ticket.done()]
            return bool(ended)

        if look():
            return ended[0]
        try:
            with self._lock:
                self._batch_ended.wait_for(look)
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            for ticket in tickets:
                _outlast(ticket)
            raise
        return ended[0]

    def wait(self, batch: _Batch) -> None:
        with self._lock:
            self._batch_ended.wait_for(batch.done)

    def cancel(self, batch: _Batch) -> int:
        with self._lock:
            return self._cancel(batch)

    def drain(self) -> None:
        interrupted: BaseException | None = None
        while True:
            try:
                with self._lock:
                    for queue in self._waiting.values():
                        for batch in list(queue):
                            self._cancel(batch)
                    self._batch_ended.wait_for(lambda: not self._totals.open)
                break
            except BaseException as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted

    def close(self) -> None:
        with self._lock:
            self._stopping = True
            self._work_waits.notify_all()
        for thread in self._threads:
            thread.join()

    def _cancel(self, batch: _Batch) -> int:
        last = batch.next
        while last < batch.last and not batch.pieces[last].first:
            last += 1
        dropped = [piece.job for piece in batch.pieces[last : batch.last] if piece.first]
        for job in dropped:
            job.dropped = True
        if dropped:
            self._open_pieces -= batch.last - last
            batch.last = last
            self._totals.add_open(-len(dropped))
            if batch.next == last:
                for queue in self._waiting.values():
                    if batch in queue:
                        queue.remove(batch)
                if self._blocked:
                    self._work_waits.notify_all()
                self._batch_ended.notify_all()
        return len(dropped)

    def _run(self) -> None:
        work = self._worker()
        while True:
            with self._lock:
                while (batch := self._next_batch()) is None:
                    blocked = any(self._waiting.values())
                    if self._stopping and not blocked:
                        return
                    self._blocked += blocked
                    self._work_waits.wait()
                    self._blocked -= blocked
                piece = batch.pieces[batch.next]
                batch.next += 1
                batch.running += 1
                self._lane_running[batch.lane] += 1
                if batch.next == batch.last:
                    for queue in self._waiting.values():
                        if batch in queue:
                            queue.remove(batch)
                # Whoever takes a piece wakes the next one, if there is room for it.
                if self._blocked and self._stopping:
                    self._work_waits.notify_all()
                elif self._blocked and self._next_batch() is not None:
                    self._work_waits.notify()
            started = time.perf_counter()
            failure: BaseException | None = None
            try:
                work(piece)
            except BaseException as error:
                failure = error
            self._note(batch, piece, failure, time.perf_counter() - started)

    def _next_batch(self) -> _Batch | None:
        """The batch whose next piece is to be read now; None when none is, or all must wait."""
        for priority in Priority:
            queue = self._waiting[priority]
            for batch in queue:
                if self._lane_running[batch.lane] < self._lanes[batch.lane].threads:
                    return batch
            if queue:
                # What is less urgent waits with it.
                return None
        return None

    def _note(
        self, batch: _Batch, piece: ReadPiece, failure: BaseException | None, seconds: float
    ) -> None:
        job = piece.job
        with self._lock:
            self._totals.seconds += seconds
            if failure is not None and (job.failure is None or piece.begin < job.failure[0]):
                job.failure = (piece.begin, failure)
            self._open_pieces -= 1
            job.pieces_left -= 1
            if not job.pieces_left:
                self._totals.add_open(-1)
                if job.failure is None:
                    self._totals.reads += 1
                    self._totals.bytes += job.request.nbytes
            batch.running -= 1
            self._lane_running[batch.lane] -= 1
            if batch.done():
                self._batch_ended.notify_all()


class _Batch(Ticket):
    """Pieces up to `next` have been taken, those from `last` on never will be."""

    def __init__(
        self, crew: _Crew, jobs: list[ReadJob], pieces: list[ReadPiece], lane: int
    ) -> None:
        self._crew = crew
        self.lane = lane
        self._jobs = jobs
        self.pieces = pieces
        self.next = 0
        self.last = len(pieces)
        self.running = 0

    def done(self) -> bool:
        return (self.next == self.last and not self.running) or self._forked()

    def cancel(self) -> int:
        return 0 if self._forked() else self._crew.cancel(self)

    def wait(self) -> None:
        if not self._forked():
            try:
                self._crew.wait(self)
            except BaseException:
                # Interrupted: still, nobody may reuse a buffer that a thread is writing to.
                _outlast(self)
                raise
        elif self.next < len(self.pieces) or self.running:
            raise ReadCancelled(*_where(self._jobs[0]))
        for job in self._jobs:
            if job.failure is not None:
                raise job.failure[1]
        for job in self._jobs:
            if job.dropped:
                raise ReadCancelled(*_where(job))

    def _forked(self) -> bool:
        """Whether this is a child process, in which nothing is left of the parent's threads."""
        return self._crew.process != os.getpid()


def _outlast(ticket: Ticket) -> None:
    """Cancel, and wait for what runs, however often that is interrupted."""
    while True:
        try:
            ticket.cancel()
            ticket.wait()
            return
        except ReadError:
            return
        except BaseException:
            if ticket.done():
                return


def _where(job: ReadJob) -> tuple[str, int]:
    return str(job.request.path), job.request.offset
