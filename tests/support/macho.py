"""What a Mach-O library says of itself: its machine, what it exports, what it takes from others.

Follows <mach-o/loader.h> and <mach-o/nlist.h>; 64-bit little-endian files only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

MAGIC_64 = 0xFEEDFACF
DYLIB = 6
MACHINES = {0x01000007: "x86_64", 0x0100000C: "arm64"}
LC_SYMTAB, LC_BUILD_VERSION = 0x2, 0x32
LC_DYLD_INFO, LC_DYLD_INFO_ONLY, LC_DYLD_EXPORTS_TRIE = 0x22, 0x80000022, 0x80000033
N_STAB, N_TYPE, N_UNDEFINED = 0xE0, 0x0E, 0
PLATFORM_MACOS = 1


@dataclass(frozen=True)
class Library:
    machine: str
    macos: str  # the oldest version that it runs on
    exports: frozenset[str]
    imports: frozenset[str]


def read_library(data: bytes) -> Library:
    """The library in a file's bytes; ValueError says why it is not one."""
    try:
        return _read(data)
    except (struct.error, IndexError) as error:
        raise ValueError("the Mach-O file is cut short or damaged") from error


def _read(data: bytes) -> Library:
    magic, cpu, _, kind = struct.unpack_from("<4I", data)
    if magic != MAGIC_64 or cpu not in MACHINES or kind != DYLIB:
        raise ValueError(f"not a Mach-O library: magic {magic:#x}, cpu {cpu:#x}, type {kind}")
    macos, trie, imports = "", b"", frozenset[str]()
    for command, at in _commands(data):
        if command == LC_BUILD_VERSION:
            platform, version = struct.unpack_from("<2I", data, at + 8)
            if platform != PLATFORM_MACOS:
                raise ValueError(f"the Mach-O library is for platform {platform}, not macOS")
            macos = f"{version >> 16}.{version >> 8 & 255}"
        elif command == LC_SYMTAB:
            imports = frozenset(_undefined(data, *struct.unpack_from("<3I", data, at + 8)))
        elif command in (LC_DYLD_INFO, LC_DYLD_INFO_ONLY, LC_DYLD_EXPORTS_TRIE):
            where = at + (8 if command == LC_DYLD_EXPORTS_TRIE else 40)
            offset, size = struct.unpack_from("<2I", data, where)
            trie = data[offset : offset + size]
    return Library(MACHINES[cpu], macos, frozenset(_exported(trie)), imports)


def _commands(data: bytes) -> Iterator[tuple[int, int]]:
    """Each load command and where it is."""
    (count,) = struct.unpack_from("<I", data, 16)
    at = 32
    for _ in range(count):
        command, size = struct.unpack_from("<2I", data, at)
        yield command, at
        at += size


def _undefined(data: bytes, symbols: int, count: int, strings: int) -> Iterator[str]:
    """Each symbol that the library uses and does not define."""
    for i in range(count):
        name, kind, _, _, _ = struct.unpack_from("<IBBHQ", data, symbols + 16 * i)
        if not kind & N_STAB and kind & N_TYPE == N_UNDEFINED:
            yield _text(data, strings + name)


def _exported(trie: bytes) -> Iterator[str]:
    """Names in an export trie: each node is what a name ends in, and edges to longer names."""
    pending = [(0, "")] if trie else []
    while pending:
        at, prefix = pending.pop()
        ending, at = _number(trie, at)
        if ending:
            yield prefix
        at += ending
        edges, at = trie[at], at + 1
        for _ in range(edges):
            label = _text(trie, at)
            child, at = _number(trie, at + len(label) + 1)
            pending.append((child, prefix + label))
            if len(prefix) > len(trie):
                raise ValueError("the export trie of the Mach-O library has a cycle")


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A ULEB128 and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, at


def _text(data: bytes, at: int) -> str:
    end = data.find(b"\0", at)
    if end < 0:
        raise IndexError(at)
    return data[at:end].decode("ascii")
