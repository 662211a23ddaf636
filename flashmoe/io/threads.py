"""Concurrent preadv from Python threads (the GIL is released while the disk works)."""

from __future__ import annotations

import os

from flashmoe.base.errors import ReadError
from flashmoe.io.depth import DEFAULT_THREADS
from flashmoe.io.files import OpenFiles
from flashmoe.io.pool import PooledReader, ReadPiece, Work
from flashmoe.io.transfer import EndOfFile, FailedRead, Preadv, Transfer


class ThreadReader(PooledReader):
    """One preadv per piece, continued after short reads, `threads` pieces at a time.

    Pieces are cut as `Depth` says; raises OptionError for numbers out of range.
    Without `page_cache` files are read past the page cache, wherever the buffers lie.
    `preadv(fd, buffers, offset) -> bytes read` can be replaced to inject faults.
    """

    def __init__(
        self,
        threads: int = DEFAULT_THREADS,
        preadv: Preadv = os.preadv,
        *,
        page_cache: bool = True,
        piece_bytes: int | None = None,
    ) -> None:
        super().__init__(OpenFiles(page_cache), threads, piece_bytes)
        self._preadv = preadv
        self._page_cache = page_cache

    def _worker(self) -> Work:
        transfer = Transfer(self._preadv, uncached=not self._page_cache)

        def fill(piece: ReadPiece) -> None:
            request, descriptor = piece.job.request, piece.job.descriptor
            path, start = str(request.path), request.offset
            try:
                transfer.fill(descriptor, request.scatter, start, piece.begin, piece.end)
            except EndOfFile as end:
                missing = start + request.nbytes - end.offset
                reason = f"the file ends {missing} bytes too early"
                raise ReadError(path, end.offset, reason) from None
            except FailedRead as failed:
                reason = os.strerror(failed.errno)
                raise ReadError(path, failed.offset, reason, failed.errno) from None

        return fill
