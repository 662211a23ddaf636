"""SHA-256 that can be put aside and taken up again by another process.

Python's hashlib keeps its state to itself. The functions below it, OpenSSL's and on Macs
CommonCrypto's, keep it in memory of the caller's, which is what a journal can hold.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import sys
from typing import Any

# The struct of either library is 104 or 112 bytes.
STATE_BYTES = 256
# Both count in 32 bits at most on some machines.
MAX_UPDATE_BYTES = 2**30


class Sha256:
    """A hash of a stream. `state()` is what a later `Sha256(state)` goes on from, or None where
    no library gives it away."""

    def __init__(self, state: bytes | None = None) -> None:
        functions = _functions()
        self._functions = functions
        self._plain = hashlib.sha256() if functions is None else None
        self._state = ctypes.create_string_buffer(STATE_BYTES)
        if functions is None:
            if state is not None:
                raise ValueError("no library here takes a hash up again")
        elif state is None:
            functions[0](self._state)
        else:
            self._state.raw = state.ljust(STATE_BYTES, b"\0")

    def update(self, content: memoryview) -> None:
        """Other threads run meanwhile. `content` must be writable memory."""
        if self._functions is None:
            assert self._plain is not None
            self._plain.update(content)
            return
        for begin in range(0, len(content), MAX_UPDATE_BYTES):
            part = content[begin : begin + MAX_UPDATE_BYTES]
            self._functions[1](
                self._state, ctypes.byref(ctypes.c_char.from_buffer(part)), len(part)
            )

    def state(self) -> bytes | None:
        return None if self._functions is None else self._state.raw.rstrip(b"\0") or b"\0"

    def hexdigest(self) -> str:
        """What the hash of everything so far is; more may follow."""
        if self._functions is None:
            assert self._plain is not None
            return self._plain.hexdigest()
        copy = ctypes.create_string_buffer(self._state.raw, STATE_BYTES)
        digest = ctypes.create_string_buffer(32)
        self._functions[2](digest, copy)
        return digest.raw.hex()


def can_be_put_aside() -> bool:
    """Whether `state()` gives a state on this machine."""
    return _functions() is not None


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
