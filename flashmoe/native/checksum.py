"""SHA-256 and CRC-32 by the processor's own instructions. Other threads run meanwhile."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from flashmoe.native import loader as native

BLOCK_BYTES = 64
# The words that FIPS 180-4 begins with.
_FIRST_WORDS = (
    *(0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A),
    *(0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19),
)


State = ctypes.Array[ctypes.c_uint32]


def first_state() -> State:
    """The eight words of a SHA-256 that nothing was taken into yet."""
    return (ctypes.c_uint32 * 8)(*_FIRST_WORDS)


@cache
def available() -> bool:
    """Whether there is a library, and a processor with these instructions."""
    if native.available() is not None:
        return False
    code: int = native.loaded().fm_sha256(first_state(), bytes(BLOCK_BYTES), None, None, 0)
    return code == native.OK


def take_in(state: State, content: memoryview) -> None:
    """Take whole blocks, in writable memory, into a state."""
    n_blocks = len(content) // BLOCK_BYTES
    if n_blocks:
        native.check(native.loaded().fm_sha256(state, _start(content), None, None, n_blocks))


def take_in_two(state: State, content: memoryview, other: State, other_content: memoryview) -> None:
    """The same for two states at once, with as many blocks for each."""
    n_blocks = len(content) // BLOCK_BYTES
    if n_blocks:
        call = native.loaded().fm_sha256
        native.check(call(state, _start(content), other, _start(other_content), n_blocks))


def crc32(content: memoryview) -> int:
    """The CRC-32 of bytes in writable memory, as zlib has it."""
    crc = ctypes.c_uint32()
    if len(content):
        call = native.loaded().fm_crc32
        native.check(call(_start(content), len(content), ctypes.byref(crc)))
    return crc.value


def _start(content: memoryview) -> Any:
    return ctypes.byref(ctypes.c_char.from_buffer(content))
