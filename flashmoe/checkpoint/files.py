"""A checkpoint's weight files as byte ranges, wherever they are."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from io import FileIO
from pathlib import Path
from typing import Protocol

import numpy as np

from flashmoe.base.errors import SourceError
from flashmoe.base.sparse_files import mostly_holes, read_at
from flashmoe.checkpoint.headers import TensorInfo, parse_header

# What any disk's blocks divide, and pages of memory are a multiple of.
BLOCK_BYTES = 4096


class SourceFile(Protocol):
    """One weight file. `version` changes when its content may have; `sha256` is its hash where
    that is known without reading it, and `trusted` says that nothing need be hashed for it."""

    @property
    def name(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def version(self) -> str: ...
    @property
    def sha256(self) -> str | None: ...
    @property
    def trusted(self) -> bool: ...
    @property
    def path(self) -> Path | None:
        """Where it lies on this disk, if it does."""

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `offset` on; may be called from several threads.

        Raises SourceError when they cannot be had.
        """

    def stop(self) -> None:
        """Make reads that wait for something give up soon."""


def header_of(file: SourceFile) -> dict[str, TensorInfo]:
    """The tensors of a weight file by name. Raises SourceError as `parse_header` does."""

    def read(offset: int, size_bytes: int) -> bytes:
        content = bytearray(min(size_bytes, max(file.size_bytes - offset, 0)))
        file.read_into(offset, memoryview(content))
        return bytes(content)

    return parse_header(str(file.path or file.name), file.size_bytes, read)


class LocalFile:
    """A weight file on this disk."""

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self.name = path.name
        try:
            status = path.stat()
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}") from None
        self.size_bytes = status.st_size
        self.sha256 = hub_digest(path)
        # The Hub cache names large files by their hash.
        self.trusted = self.sha256 is not None
        self.version = self.sha256 or f"{status.st_mtime_ns}"

    def read_into(self, offset: int, out: memoryview) -> None:
        """As SourceFile has it. What is read once need not fill the page cache: whole blocks,
        at an offset and in memory that are multiples of a block, go past it."""
        whole_bytes = len(out) - len(out) % BLOCK_BYTES
        if offset % BLOCK_BYTES or _address(out) % BLOCK_BYTES:
            whole_bytes = 0
        try:
            # Opened for each read: a model may have more files than a process may open.
            with Path(str(self.path)).open("rb", buffering=0) as file:
                if not mostly_holes(file):
                    file.seek(offset)
                    done = _read_past_cache(file, out[:whole_bytes])
                    out, offset = out[done:], offset + done
                while out:
                    done = read_at(file, out, offset)
                    if not done:
                        raise SourceError(
                            f"{self.path} ended at {offset} while it was read; is it changing?"
                        )
                    out, offset = out[done:], offset + done
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}") from error

    def stop(self) -> None:
        """Reads of a disk wait for nothing."""


def _read_past_cache(file: FileIO, out: memoryview) -> int:
    """Read whole blocks without their pages staying in memory. Returns how many bytes that gave:
    fewer at the file's end, none where its file system refuses."""
    done = 0
    if not out or not _use_page_cache(file, False):
        return done
    try:
        while done < len(out) and done % BLOCK_BYTES == 0:
            found = file.readinto(out[done:])
            if not found:
                break
            done += found
    except OSError as error:
        # Some take the flag and refuse the read.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    _use_page_cache(file, True)
    return done


def _use_page_cache(file: FileIO, wanted: bool) -> bool:
    """Whether reads of an open file go through the page cache from now on as wanted."""
    try:
        if hasattr(fcntl, "F_NOCACHE"):
            fcntl.fcntl(file, fcntl.F_NOCACHE, int(not wanted))
        elif hasattr(os, "O_DIRECT"):
            flags = fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT
            fcntl.fcntl(file, fcntl.F_SETFL, flags | (0 if wanted else os.O_DIRECT))
        else:
            return wanted
    except OSError:
        return wanted
    return True


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data) if memory else 0


class ConsumedFile:
    """A weight file that is not there any more, because a store has all that was in it."""

    path: Path | None = None
    sha256: str | None = None
    trusted = False

    def __init__(self, name: str, size_bytes: int, version: str) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.version = version

    def read_into(self, offset: int, out: memoryview) -> None:
        raise SourceError(f"{self.name} was consumed and cannot be read again")

    def stop(self) -> None:
        """Nothing waits for what is not there."""


def hub_digest(path: Path) -> str | None:
    """The SHA-256 by which the Hub cache names a large file, or None for any other file."""
    blob = path.resolve()
    is_blob = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    return blob.name if is_blob else None
