"""The contract every reader keeps."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class ReadRequest:
    """Fill `buffers` (writable, flat, bytes) one after the other from `offset` of `path`."""

    path: Path
    offset: int
    buffers: Sequence[memoryview]

    @property
    def nbytes(self) -> int:
        return sum(len(buffer) for buffer in self.buffers)


class Ticket(Protocol):
    """A submitted batch."""

    def wait(self) -> None:
        """Return once every byte of the batch is in place.

        Raises ReadError for the first request that failed, after all requests have ended: no
        buffer is written to once this returns or raises.
        """


@dataclass
class ReadCounters:
    """Totals since the reader was opened; `seconds` adds up over concurrent reads."""

    reads: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Reader(abc.ABC):
    """Reads batches of byte ranges; closed readers refuse further batches."""

    counters: ReadCounters

    @abc.abstractmethod
    def submit(self, requests: Sequence[ReadRequest]) -> Ticket:
        """Start reading a batch.

        Raises ReadError when a file cannot be opened.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Wait for what is running and give back files and threads; closing twice is fine."""
