"""Hashing streams beside everything else, two at a time where that takes little longer than one."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashmoe.repacking.digest import Sha256, sha256, takes_two, update_two

# What is hashed alone before looking for company again.
ALONE_BYTES = 2**20
# How long a stream waits for another, as long as others came: time that is spent twice is dearer
# than this.
COMPANY_SECONDS = 0.05
# What is read at a time of a file that is hashed.
READ_BYTES = 4 * 2**20


@dataclass
class _Job:
    digest: Sha256
    content: memoryview
    done: Future[None]


class Hashing:
    """Threads that hash, until `close`."""

    def __init__(self) -> None:
        self._in_pairs = takes_two()
        self._jobs: deque[_Job] = deque()
        self._submitted = threading.Condition()
        self._waits = True
        self._threads = ThreadPoolExecutor(
            1 if self._in_pairs else 2, thread_name_prefix="flashmoe-hash"
        )

    def close(self) -> None:
        """Wait for what has been submitted."""
        self._threads.shutdown()

    def submit(self, digest: Sha256, content: memoryview) -> Future[None]:
        """Update a hash, which nothing else may do until that is done."""
        job = _Job(digest, content, Future())
        with self._submitted:
            self._jobs.append(job)
            self._submitted.notify()
        self._threads.submit(self._work)
        return job.done

    def hash_file(self, path: Path) -> str:
        """SHA-256 of a whole file in hex; this thread reads it. Raises OSError."""
        digest = sha256()
        memory, other = (np.empty(READ_BYTES, np.uint8).data for _ in range(2))
        hashing: Future[None] | None = None
        with path.open("rb", buffering=0) as file:
            while found := file.readinto(memory):
                if hashing is not None:
                    hashing.result()
                hashing = self.submit(digest, memory[:found])
                memory, other = other, memory
        if hashing is not None:
            hashing.result()
        return digest.hexdigest()

    def _work(self) -> None:
        while True:
            jobs = self._take()
            if not jobs:
                return
            try:
                size_bytes = _hash_some(jobs)
            except BaseException as error:
                for job in jobs:
                    job.done.set_exception(error)
                continue
            for job in jobs:
                job.content = job.content[size_bytes:]
                if job.content:
                    with self._submitted:
                        self._jobs.appendleft(job)
                else:
                    job.done.set_result(None)

    def _take(self) -> list[_Job]:
        """What is hashed next: two where that pays, none when there is nothing to do."""
        with self._submitted:
            if self._in_pairs and len(self._jobs) == 1 and self._waits:
                self._submitted.wait(COMPANY_SECONDS)
            n_jobs = min(len(self._jobs), 2 if self._in_pairs else 1)
            if n_jobs:
                self._waits = n_jobs == 2
            return [self._jobs.popleft() for _ in range(n_jobs)]


def _hash_some(jobs: list[_Job]) -> int:
    """Hash as much of one job, or of each of two, as is best before looking again."""
    first = jobs[0]
    if len(jobs) == 1:
        size_bytes = min(len(first.content), ALONE_BYTES)
        first.digest.update(first.content[:size_bytes])
        return size_bytes
    second = jobs[1]
    size_bytes = min(len(first.content), len(second.content))
    update_two(first.digest, first.content[:size_bytes], second.digest, second.content[:size_bytes])
    return size_bytes
