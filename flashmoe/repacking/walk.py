"""Walking a schedule: read, make, write, and note what is whole, so that any run can go on."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from flashmoe.base.errors import SourceError, StoreError
from flashmoe.base.sparse_files import filled
from flashmoe.checkpoint.files import SourceFile
from flashmoe.repacking.digest import Sha256, crc32, sha256, take_up
from flashmoe.repacking.hashing import Hashing
from flashmoe.repacking.journal import Journal, Reached
from flashmoe.repacking.pieces import Maker
from flashmoe.repacking.schedule import Group, Schedule
from flashmoe.repacking.source_stream import SourceStream
from flashmoe.store.writer import StoreWriter

# Between two lines of the journal; a killed run does again what it did since the last.
STEP_SECONDS = 3.0
# A disk that has nothing to write meanwhile would have it all to write in the end.
STEP_BYTES = 128 * 2**20
# With less than this free, and more to write, a run stops while it still can note how far it is.
RESERVE_BYTES = 32 * 2**20
HASHED_AGAIN_BYTES = 8 * 2**20


class Run:
    """One repack into one folder; use it as a context manager.

    `advance(n_bytes)` is told of what was written, or of what was fetched where that is not all on
    this disk; `total_bytes` is what that comes to. What is on disk and noted in the journal, a
    later run does not do again, however this one ends.
    """

    def __init__(
        self,
        schedule: Schedule,
        files: Sequence[SourceFile],
        writer: StoreWriter,
        journal: Journal,
        advance: Callable[[int], None],
    ) -> None:
        self.progress = Reached()
        for entry in journal.entries[1:]:
            self.progress.apply(entry)
        # Zeros stay holes where nothing else can have been written before.
        self._may_leave_holes = len(journal.entries) == 1
        self._schedule = schedule
        self._files = files
        self._writer = writer
        self._journal = journal
        self._advance = advance
        self._crcs = self.progress.crcs
        self._whole_crcs = self._noted_crcs = len(self._crcs)
        self._late_crcs: dict[int, bytes] = {}
        self._open: set[str] = set()
        self._touched: set[str] = set()
        self._left = [0] * len(schedule.files)
        self._fetches = any(file.path is None for file in files)
        self._remaining_bytes = 0
        self._unnoted_bytes = 0
        self._digest = sha256()
        self._hash = Hashing()
        self._hashing: Future[None] | None = None
        self._noting: Future[None] | None = None
        self._noted = time.monotonic()
        self._storing: dict[str, Future[str]] = {}
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="flashmoe-store-hash")
        self._noter = ThreadPoolExecutor(1, thread_name_prefix="flashmoe-journal")

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for pool in (self._checker, self._noter):
            pool.shutdown(cancel_futures=True)
        self._hash.close()

    @property
    def crcs(self) -> memoryview:
        """CRC-32s, 4 bytes each, in the order in which the pieces write."""
        return memoryview(self._crcs)

    @property
    def late_crcs(self) -> dict[int, bytes]:
        """The same for parameters that were written whole."""
        return self._late_crcs

    @property
    def total_bytes(self) -> int:
        """What `advance` will have been told of in the end."""
        if self._fetches:
            return sum(f.size_bytes for i, f in enumerate(self._files) if self._is_read(i))
        return sum(
            parameter.n_rows * sink.row_bytes
            for parameter in self._schedule.parameters
            for sink in parameter.sinks
        )

    def walk(self, maker: Maker | None, finished: Callable[[Reached], None]) -> None:
        """Make every piece that is not whole yet. `finished` is told how far the journal is each
        time that it says a source file is done.

        Raises SourceError, StoreError, or OSError of a file that cannot be written.
        """
        self._count()
        finished(self.progress)
        try:
            with SourceStream(self._files, self._groups()) as reading:
                current = self.progress.file
                self._digest = self._hash_so_far(current)
                for index, group, content in reading:
                    if index != current:
                        self._finish(current, finished)
                        current = self.progress.file = index
                        self.progress.position, self._digest = 0, sha256()
                    self._put_group(group, content, maker)
                    self._wait_for_hash()
                    if self._is_hashed(index):
                        self._hashing = self._hash.submit(self._digest, content)
                    self._advance_to(group)
                self._finish(current, finished)
        except BaseException:
            # What is whole is noted, unless that is what failed.
            with contextlib.suppress(OSError, StoreError):
                self._note_now()
            raise

    def put_whole(self, index: int, contents: Sequence[memoryview]) -> None:
        """Write a whole parameter, which is not noted: a next run makes it again."""
        parameter = self._schedule.parameters[index]
        crcs = self._write(index, 0, parameter.n_rows, contents)
        self._late_crcs[index] = crcs

    def settle(self) -> dict[str, str]:
        """Wait until everything is hashed, on disk and noted; SHA-256 of the store's files."""
        for future in list(self._storing.values()):
            future.result()
        self._note_now()
        return self.progress.stored

    def _count(self) -> None:
        """What is left to write of each file of the store; those that are whole are hashed."""
        schedule = self._schedule
        done = self.progress.pieces
        done_bytes = 0
        for position, piece in enumerate(schedule.pieces):
            for sink in schedule.parameters[piece.parameter].sinks:
                if position >= done:
                    self._left[sink.file] += 1
                    self._remaining_bytes += (piece.end - piece.begin) * sink.row_bytes
                else:
                    done_bytes += (piece.end - piece.begin) * sink.row_bytes
        for index in schedule.late:
            for sink in schedule.parameters[index].sinks:
                self._left[sink.file] += 1
        if self._fetches:
            current = self.progress.file
            read = [i for i in range(len(self._files)) if self._is_read(i)]
            done_bytes = sum(self._files[i].size_bytes for i in read if i < current)
            done_bytes += self.progress.position if current in read else 0
        if done_bytes:
            self._advance(done_bytes)
        for file, left in enumerate(self._left):
            if left == 0:
                self._hash_stored(file)

    def _groups(self) -> Iterator[tuple[int, Group]]:
        """What is left to read."""
        first = self.progress.pieces
        pieces = self._schedule.pieces
        for index in range(self.progress.file, len(self._files)):
            file = self._files[index]
            begin = self.progress.position if index == self.progress.file else 0
            if file.name not in self.progress.sources and self._is_read(index):
                for group in self._schedule.groups(index, file.size_bytes, first, begin):
                    if group.end_piece > group.first_piece or self._is_hashed(index):
                        yield index, group
            while first < len(pieces) and pieces[first].file == index:
                first += 1

    def _is_read(self, index: int) -> bool:
        """Files that nothing is made of are read only for their hash."""
        return self._schedule.has_pieces(index) or self._files[index].sha256 is None

    def _is_hashed(self, index: int) -> bool:
        return self._is_read(index) and not self._files[index].trusted

    def _hash_so_far(self, index: int) -> Sha256:
        """The hash of a source file up to where the last run came."""
        position, state = self.progress.position, self.progress.state
        if position == 0 or not self._is_hashed(index):
            return sha256()
        digest = take_up(state) if state is not None else None
        if digest is not None:
            return digest
        digest = sha256()
        for begin in range(0, position, HASHED_AGAIN_BYTES):
            content = np.empty(min(HASHED_AGAIN_BYTES, position - begin), np.uint8).data
            self._files[index].read_into(begin, content)
            digest.update(content)
        return digest

    def _put_group(self, group: Group, content: memoryview, maker: Maker | None) -> None:
        for position in range(group.first_piece, group.end_piece):
            assert maker is not None
            piece = self._schedule.pieces[position]
            parameter = self._schedule.parameters[piece.parameter]
            contents = maker.make(parameter, piece, group.begin, content)
            self._crcs += self._write(piece.parameter, piece.begin, piece.end, contents)

    def _write(self, index: int, begin: int, end: int, contents: Sequence[memoryview]) -> bytes:
        """Write rows of a parameter to its sinks; their CRC-32s."""
        parameter = self._schedule.parameters[index]
        crcs = bytearray()
        for sink, content in zip(parameter.sinks, contents, strict=True):
            size_bytes = sink.row_bytes
            if len(content) != (end - begin) * size_bytes:
                raise SourceError(
                    f"{parameter.name} gives {len(content)} bytes for rows {begin} to {end}, "
                    f"not {(end - begin) * size_bytes}"
                )
            if not sink.part_step:
                begin_at = sink.start + begin * sink.stride
                crcs += self._write_at(sink.file, begin_at, content)
            else:
                for row in range(begin, end):
                    part = content[(row - begin) * size_bytes : (row - begin + 1) * size_bytes]
                    crcs += self._write_at(sink.file, sink.start + row * sink.stride, part)
            self._left[sink.file] -= 1
            if self._left[sink.file] == 0:
                self._hash_stored(sink.file)
            if not self._fetches:
                self._advance(len(content))
            self._remaining_bytes -= len(content)
            self._unnoted_bytes += len(content)
        return bytes(crcs)

    def _write_at(self, file: int, offset: int, content: memoryview) -> bytes:
        layout = self._schedule.files[file]
        if layout.name not in self._open:
            self._writer.create(layout.name, layout.header, layout.size_bytes)
            self._open.add(layout.name)
        self._touched.add(layout.name)
        stretches = filled(content, offset) if self._may_leave_holes else [(0, len(content))]
        for begin, end in stretches:
            self._writer.write(layout.name, offset + begin, content[begin:end])
        return crc32(content).to_bytes(4, "big")

    def _hash_stored(self, file: int) -> None:
        name = self._schedule.files[file].name
        if name not in self.progress.stored:
            path = self._writer.folder / name
            self._storing[name] = self._checker.submit(self._hash.hash_file, path)

    def _advance_to(self, group: Group) -> None:
        self.progress.pieces = group.end_piece
        self.progress.position = group.end
        self._whole_crcs = len(self._crcs)
        if self._fetches:
            self._advance(group.end - group.begin)
        waited = time.monotonic() - self._noted
        if waited < STEP_SECONDS and self._unnoted_bytes < STEP_BYTES:
            return
        free = shutil.disk_usage(self._writer.folder).free
        if free < min(RESERVE_BYTES, self._remaining_bytes):
            raise StoreError(
                f"{self._writer.folder} has {free / 1e6:.0f} MB left on its disk and needs "
                f"{self._remaining_bytes / 1e9:.1f} GB more; free some and run the same command "
                "again, it goes on from here"
            )
        if self._noting is None or self._noting.done():
            self._note()

    def _wait_for_hash(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None

    def _finish(self, index: int, finished: Callable[[Reached], None]) -> None:
        """A source file has been walked to its end."""
        file, progress = self._files[index], self.progress
        if file.name in progress.sources:
            return
        self._wait_for_hash()
        digest = self._digest.hexdigest() if self._is_hashed(index) else file.sha256
        assert digest is not None
        if file.sha256 not in (None, digest):
            self._take_back(index)
            raise SourceError(
                f"{file.name} did not arrive as the Hub has it: its SHA-256 is {digest[:12]}..., "
                f"not {str(file.sha256)[:12]}...; run the same command again to fetch it once more"
            )
        progress.sources[file.name] = digest
        self._note(finished)

    def _take_back(self, index: int) -> None:
        """Nothing that was made of a source file counts any more."""
        schedule, progress = self._schedule, self.progress
        first = schedule.first_piece(index)
        n_crcs = 0
        for piece in schedule.pieces[:first]:
            for sink in schedule.parameters[piece.parameter].sinks:
                n_crcs += piece.end - piece.begin if sink.part_step else 1
        del self._crcs[4 * n_crcs :]
        self._whole_crcs = len(self._crcs)
        self._noted_crcs = min(self._noted_crcs, self._whole_crcs)
        spoiled = {
            schedule.files[sink.file].name
            for piece in schedule.pieces[first:]
            for sink in schedule.parameters[piece.parameter].sinks
        }
        for name in spoiled:
            self._storing.pop(name, None)
            progress.stored.pop(name, None)
        progress.pieces, progress.file, progress.position = first, index, 0
        self._digest = sha256()

    def _note(self, then: Callable[[Reached], None] | None = None) -> None:
        """Have what is whole put on disk and noted, meanwhile; `then` is told of it."""
        self._wait_for_hash()
        if self._noting is not None:
            self._noting.result()
        progress = self.progress
        hashed = [name for name, future in self._storing.items() if future.done()]
        for name in hashed:
            progress.stored[name] = self._storing.pop(name).result()
        written, self._touched = self._touched, set()
        names = {
            file.name
            for file, left in zip(self._schedule.files, self._left, strict=True)
            if left == 0
        }
        complete = self._open & names
        self._open -= complete
        # An interruption may come between hashing bytes and counting them.
        counted = progress.position and self._digest.n_bytes == progress.position
        progress.state = self._digest.state() if counted else None
        crcs = self._crcs[self._noted_crcs : self._whole_crcs]
        entry = progress.entry(self._noted_crcs // 4, bytes(crcs))
        self._noted_crcs = self._whole_crcs
        self._unnoted_bytes = 0
        snapshot = progress.copy()

        def note() -> None:
            for name in written:
                self._writer.sync(name)
            for name in complete:
                self._writer.close(name)
            for name in hashed:
                self._writer.release(name)
            self._journal.add(entry)
            self._noted = time.monotonic()
            if then is not None:
                then(snapshot)

        self._noting = self._noter.submit(note)

    def _note_now(self) -> None:
        self._note()
        assert self._noting is not None
        self._noting.result()
