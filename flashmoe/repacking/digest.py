"""SHA-256 that another process can go on with, and CRC-32.

The native library keeps a hash's state in the caller's memory. Python's hashlib does not give its
state away: without the library, a run that goes on reads again what it has to hash.
"""

from __future__ import annotations

import ctypes
import hashlib
import zlib
from typing import Protocol

from flashmoe.native import checksum

# Less is not worth a call of ours.
LEAST_CRC_BYTES = 4096


class Sha256(Protocol):
    """A hash of a stream of `n_bytes` so far. `state()` is what `take_up` goes on from, or None
    where nothing here gives it away. `update` takes writable memory; other threads run meanwhile.
    """

    n_bytes: int

    def update(self, content: memoryview) -> None: ...
    def state(self) -> bytes | None: ...
    def hexdigest(self) -> str:
        """What the hash of everything so far is; more may follow."""


def sha256() -> Sha256:
    """The hash of a stream from its beginning."""
    return NativeSha256() if checksum.available() else PlainSha256()


def take_up(state: bytes) -> Sha256 | None:
    """The hash that was put aside, or None where what made `state` is not here."""
    kind, own = state[:1], state[1:]
    if kind == NativeSha256.KIND and checksum.available():
        return NativeSha256(own)
    return None


def takes_two() -> bool:
    """Whether two hashes at once take little longer than one."""
    return checksum.available()


def update_two(first: Sha256, content: memoryview, second: Sha256, other: memoryview) -> None:
    """Update one hash and another, at once where `takes_two()`."""
    if not isinstance(first, NativeSha256) or not isinstance(second, NativeSha256):
        first.update(content)
        second.update(other)
        return
    content, other = first.complete(content), second.complete(other)
    size_bytes = min(len(content), len(other)) // checksum.BLOCK_BYTES * checksum.BLOCK_BYTES
    checksum.take_in_two(first.words, content[:size_bytes], second.words, other[:size_bytes])
    first.n_bytes += size_bytes
    second.n_bytes += size_bytes
    first.update(content[size_bytes:])
    second.update(other[size_bytes:])


class NativeSha256:
    """By the native library, which takes whole blocks."""

    KIND = b"n"

    def __init__(self, state: bytes | None = None) -> None:
        self.words = checksum.first_state()
        self.n_bytes = 0
        self._rest = bytearray()
        if state is not None:
            ctypes.memmove(self.words, state[:32], 32)
            self.n_bytes = int.from_bytes(state[32:40], "little")
            self._rest += state[40:]

    def update(self, content: memoryview) -> None:
        content = self.complete(content)
        size_bytes = len(content) // checksum.BLOCK_BYTES * checksum.BLOCK_BYTES
        checksum.take_in(self.words, content[:size_bytes])
        self.n_bytes += len(content)
        self._rest += content[size_bytes:]

    def complete(self, content: memoryview) -> memoryview:
        """Take in what the block that was begun lacks; the content that is left."""
        if not self._rest:
            return content
        taken = content[: checksum.BLOCK_BYTES - len(self._rest)]
        self._rest += taken
        self.n_bytes += len(taken)
        if len(self._rest) == checksum.BLOCK_BYTES:
            checksum.take_in(self.words, memoryview(self._rest))
            self._rest = bytearray()
        return content[len(taken) :]

    def state(self) -> bytes:
        return self.KIND + bytes(self.words) + self.n_bytes.to_bytes(8, "little") + self._rest

    def hexdigest(self) -> str:
        zeros = (55 - self.n_bytes) % checksum.BLOCK_BYTES
        end = self._rest + b"\x80" + bytes(zeros) + (8 * self.n_bytes).to_bytes(8, "big")
        words = type(self.words)(*self.words)
        checksum.take_in(words, memoryview(end))
        return "".join(f"{word:08x}" for word in words)


class PlainSha256:
    """By hashlib."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.n_bytes = 0

    def update(self, content: memoryview) -> None:
        self._hash.update(content)
        self.n_bytes += len(content)

    def state(self) -> None:
        return None

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def crc32(content: memoryview) -> int:
    """The CRC-32 of some bytes, as zlib has it; other threads run meanwhile."""
    if len(content) < LEAST_CRC_BYTES or content.readonly or not checksum.available():
        return zlib.crc32(content)
    return checksum.crc32(content)


def combine_crc32(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32 of two stretches, one after the other, out of theirs (as zlib's crc32_combine:
    a CRC is linear, so `first` is sent through `second_bytes` zero bytes by squaring)."""
    square = [0xEDB88320, *(1 << bit for bit in range(31))]  # one zero bit
    square = _squared(_squared(square))  # four
    while second_bytes:
        square = _squared(square)  # 8, 16, 32... zero bits
        if second_bytes & 1:
            first = _times(square, first)
        second_bytes >>= 1
    return first ^ second


def _times(matrix: list[int], vector: int) -> int:
    total = 0
    for row in matrix:
        if vector & 1:
            total ^= row
        vector >>= 1
    return total


def _squared(matrix: list[int]) -> list[int]:
    return [_times(matrix, row) for row in matrix]
