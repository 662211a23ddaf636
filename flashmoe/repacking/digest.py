"""SHA-256 that can be put aside and taken up again by another process, and CRC-32.

Python's hashlib keeps its state to itself. The native library keeps it in memory of the caller's,
and so do the functions below hashlib, OpenSSL's and on Macs CommonCrypto's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import sys
import zlib
from typing import Any, Protocol

from flashmoe.native import checksum

# The struct of either library below hashlib is 104 or 112 bytes.
STATE_BYTES = 256
# Both count in 32 bits at most on some machines.
MAX_UPDATE_BYTES = 2**30
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
    if checksum.available():
        return NativeSha256()
    return LibrarySha256() if _functions() is not None else PlainSha256()


def take_up(state: bytes) -> Sha256 | None:
    """The hash that was put aside, or None where what made `state` is not here."""
    kind, own = state[:1], state[1:]
    if kind == NativeSha256.KIND and checksum.available():
        return NativeSha256(own)
    if kind == LibrarySha256.KIND and _functions() is not None:
        return LibrarySha256(own)
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


class LibrarySha256:
    """By the library below hashlib."""

    KIND = b"l"

    def __init__(self, state: bytes | None = None) -> None:
        functions = _functions()
        assert functions is not None
        self._init, self._update, self._final = functions
        self._state = ctypes.create_string_buffer(STATE_BYTES)
        self.n_bytes = 0
        if state is None:
            self._init(self._state)
        else:
            self.n_bytes = int.from_bytes(state[:8], "little")
            self._state.raw = state[8:].ljust(STATE_BYTES, b"\0")

    def update(self, content: memoryview) -> None:
        for begin in range(0, len(content), MAX_UPDATE_BYTES):
            part = content[begin : begin + MAX_UPDATE_BYTES]
            self._update(self._state, ctypes.byref(ctypes.c_char.from_buffer(part)), len(part))
        self.n_bytes += len(content)

    def state(self) -> bytes:
        return self.KIND + self.n_bytes.to_bytes(8, "little") + self._state.raw.rstrip(b"\0")

    def hexdigest(self) -> str:
        copy = ctypes.create_string_buffer(self._state.raw, STATE_BYTES)
        digest = ctypes.create_string_buffer(32)
        self._final(digest, copy)
        return digest.raw.hex()


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


@functools.cache
def _functions() -> tuple[Any, Any, Any] | None:
    """Init, update and final of a SHA-256 with its state in the caller's memory."""
    try:
        if sys.platform == "darwin":
            library, prefix = ctypes.CDLL(None), "CC_SHA256_"
        else:
            import _hashlib

            # Python's own OpenSSL, whatever it is called here.
            library, prefix = ctypes.CDLL(_hashlib.__file__), "SHA256_"
        functions = tuple(getattr(library, prefix + name) for name in ("Init", "Update", "Final"))
    except (OSError, AttributeError, ImportError, TypeError):
        return None
    functions[0].argtypes = [ctypes.c_void_p]
    functions[1].argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    functions[2].argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    init, update, final = functions
    return (init, update, final) if _works(init, update, final) else None


def _works(init: Any, update: Any, final: Any) -> bool:
    """Whether a state moved to other memory halfway still gives hashlib's answer."""
    text = bytes(range(256)) * 3
    first = ctypes.create_string_buffer(STATE_BYTES)
    init(first)
    update(first, text, 100)
    second = ctypes.create_string_buffer(first.raw.rstrip(b"\0"), STATE_BYTES)
    update(second, text[100:], len(text) - 100)
    digest = ctypes.create_string_buffer(32)
    final(digest, second)
    return digest.raw == hashlib.sha256(text).digest()


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
