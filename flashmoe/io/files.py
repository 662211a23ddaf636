"""Open files, shared by the threads of a reader."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import sys
import threading
from pathlib import Path

from flashmoe.base.errors import ReadError
from flashmoe.io.depth import BLOCK_BYTES


class OpenFiles:
    """A descriptor per path, opened when it is first asked for.

    Without `page_cache` reads go past the operating system's page cache: they have to be
    aligned to blocks of 4 KiB, and on macOS what is cached already is still taken from there.
    """

    def __init__(self, page_cache: bool = True) -> None:
        self._page_cache = page_cache
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    def descriptor(self, path: Path, offset: int) -> int:
        """The descriptor of `path`; errors name the `offset` that was wanted."""
        with self._lock:
            if self._closed:
                raise ReadError(str(path), offset, "the reader is closed")
            found = self._descriptors.get(path)
            if found is None:
                try:
                    found = _open_cached(path) if self._page_cache else _open_uncached(path)
                except OSError as error:
                    raise ReadError(
                        str(path), offset, _reason(error, self._page_cache), error.errno
                    ) from None
                self._descriptors[path] = found
            return found

    def refuse(self) -> None:
        """Refuse whatever is asked for from now on."""
        with self._lock:
            self._closed = True

    def close(self) -> None:
        """Give the descriptors back."""
        with self._lock:
            self._closed = True
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()


def uncached_problem(path: Path) -> str | None:
    """Why `path` cannot be read past the page cache; None when it can.

    Raises ReadError when it cannot be read at all.
    """
    with contextlib.closing(OpenFiles()) as files:
        files.descriptor(path, 0)
    try:
        descriptor = _open_uncached(path)
    except OSError as error:
        return str(error.strerror)
    # Some file systems accept the flag and then refuse to read.
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as block:
            os.preadv(descriptor, [block], 0)
    except OSError as error:
        return str(error.strerror)
    finally:
        os.close(descriptor)
    return None


def _open(path: Path, flags: int = 0) -> int:
    descriptor = os.open(path, os.O_RDONLY | flags)
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    return descriptor


def _open_cached(path: Path) -> int:
    descriptor = _open(path)
    if hasattr(os, "posix_fadvise"):
        # Nothing follows a record but other experts': reading ahead would cost half the disk.
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor


def _open_uncached(path: Path) -> int:
    if sys.platform == "darwin":
        import fcntl

        descriptor = _open(path)
        try:
            fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor
    if not hasattr(os, "O_DIRECT"):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    if path.is_dir():
        return _open(path)
    return _open(path, os.O_DIRECT)


def _reason(error: OSError, page_cache: bool) -> str:
    if not page_cache and error.errno in (errno.EINVAL, errno.ENOTSUP):
        return f"its file system reads only through the page cache ({error.strerror})"
    return str(error.strerror)
