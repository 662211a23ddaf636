"""Which readers exist here, which one a name means, and whether the page cache is used."""

from __future__ import annotations

from dataclasses import dataclass, field

from flashmoe import native
from flashmoe.base.errors import OptionError
from flashmoe.io.depth import DEFAULT_THREADS, Depth
from flashmoe.io.mapped import MmapReader
from flashmoe.io.native import NativeReader
from flashmoe.io.reader import Reader
from flashmoe.io.threads import ThreadReader

AUTO = "pread"


@dataclass(frozen=True)
class ReadSettings:
    """A reader by name, and how deep it reads.

    Raises OptionError for a reader that does not exist.
    """

    reader: str = "auto"
    depth: Depth = field(default_factory=Depth)

    def __post_init__(self) -> None:
        resolve_reader(self.reader)


@dataclass(frozen=True)
class ReaderStatus:
    """A reader, whether it can run here, and what there is to say about it."""

    name: str
    available: bool
    note: str


def reader_names() -> list[str]:
    """The values that `reader=` accepts here."""
    return ["auto", *(status.name for status in reader_statuses() if status.available)]


def reader_statuses() -> list[ReaderStatus]:
    """Every reader of this package."""
    missing = native.available()
    if missing is None:
        note = f"native library, {DEFAULT_THREADS} threads"
    else:
        note = f"{DEFAULT_THREADS} Python threads, because {missing}"
    return [
        ReaderStatus("pread", True, note),
        ReaderStatus("mmap", True, f"memory maps, {DEFAULT_THREADS} Python threads"),
    ]


def resolve_reader(name: str = "auto", page_cache: bool | None = None) -> str:
    """The name of the reader that `name` stands for.

    Raises OptionError for one that does not exist, or cannot do without the page cache.
    """
    chosen = AUTO if name == "auto" else name
    if chosen not in reader_names():
        raise OptionError(f"reader must be one of {reader_names()}, not {name!r}")
    if chosen == "mmap" and page_cache is False:
        raise OptionError("reader mmap always reads through the page cache: take pread without it")
    return chosen


def open_reader(settings: ReadSettings | str = "auto", *, page_cache: bool = True) -> Reader:
    """The reader of these settings, or of that name; raises OptionError as `resolve_reader`
    does."""
    if isinstance(settings, str):
        settings = ReadSettings(settings)
    threads, piece_bytes = settings.depth.threads, settings.depth.piece_bytes
    if resolve_reader(settings.reader, page_cache) == "mmap":
        return MmapReader(threads, piece_bytes)
    kind = NativeReader if native.available() is None else ThreadReader
    return kind(threads, page_cache=page_cache, piece_bytes=piece_bytes)


def choose_page_cache(
    page_cache: bool | None,
    reader: str,
    problem: str | None,
    *,
    file_bytes: int,
    free_bytes: int,
) -> tuple[bool, str]:
    """Whether to read through the page cache, and why.

    None means: unless the `file_bytes` that will be read again and again do not fit into
    `free_bytes`, and the file system can do without (`problem` says why it cannot). Raises
    OptionError when the page cache is refused and the reader or the file system needs it.
    """
    mapped = resolve_reader(reader, page_cache) == "mmap"
    if page_cache is True or mapped:
        return True, "memory maps need it" if mapped else "as asked"
    if page_cache is None:
        if file_bytes <= free_bytes:
            return True, "all records fit into the memory that is left"
        if problem is not None:
            return True, f"the file system cannot do without: {problem}"
        return False, "the records do not fit into the memory that is left"
    if problem is not None:
        raise OptionError(
            f"the store is on a file system that reads only through the page cache ({problem}): "
            "leave the page cache on, or move the store"
        )
    return False, "as asked"
