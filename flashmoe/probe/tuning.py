"""What was measured to be fastest for a store on a machine, remembered in a JSON file.

The file is a convenience: one that cannot be read, or is of another version, machine or store,
counts as absent. Nothing in it changes a result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flashmoe.base import machine
from flashmoe.base.errors import OptionError
from flashmoe.base.json_cache import put_in_place, read_kept, rebuild
from flashmoe.io.select import ReadSettings, resolve_reader
from flashmoe.store.manifest import MANIFEST_NAME
from flashmoe.store.reader import Store

VERSION = 2
FOLDER = "tuning"


@dataclass(frozen=True)
class Reads:
    """How records are read: `decode` the few that a token misses, `prefill` a prompt's many."""

    decode: ReadSettings = field(default_factory=ReadSettings)
    prefill: ReadSettings = field(default_factory=ReadSettings)


@dataclass(frozen=True)
class Choice:
    """Settings that the engine takes for what its user left open.

    `cached` and `uncached` are those of reading through the page cache and past it. Raises
    OptionError for a reader that cannot do what it is for.
    """

    cached: Reads = field(default_factory=Reads)
    uncached: Reads = field(default_factory=Reads)

    def __post_init__(self) -> None:
        for settings in (self.uncached.decode, self.uncached.prefill):
            resolve_reader(settings.reader, page_cache=False)

    def reads(self, page_cache: bool, reader: str = "auto") -> Reads:
        """The settings of reading through the page cache, or past it, with the user's reader.

        A choice of depth is one for its own reader: another one reads at its default depth.
        """
        reads = self.cached if page_cache else self.uncached
        if reader == "auto":
            return reads

        def with_reader(settings: ReadSettings) -> ReadSettings:
            same = resolve_reader(settings.reader) == resolve_reader(reader)
            return settings if same else ReadSettings(reader)

        return Reads(with_reader(reads.decode), with_reader(reads.prefill))


@dataclass(frozen=True)
class Tuning:
    """A choice, and what was measured with it.

    `bytes_per_second` from the disk in decode's pattern. `when` is the date and time, ISO 8601
    in UTC. Raises OptionError for a rate that cannot be.
    """

    choice: Choice
    bytes_per_second: float
    when: str

    def __post_init__(self) -> None:
        if not 0 < self.bytes_per_second < math.inf:
            raise OptionError(f"a disk cannot give {self.bytes_per_second} bytes per second")


class TuningFile:
    """The place of one store's tuning on this machine, in a cache folder."""

    def __init__(self, cache_folder: Path, store: Store) -> None:
        place = {
            "machine": asdict(machine.describe(store.path)),
            "store": _digest((store.path / MANIFEST_NAME).read_bytes()),
        }
        key = _digest(json.dumps(list(place.values()), sort_keys=True).encode())
        self._head = {"version": VERSION, **place}
        self.path = cache_folder / FOLDER / f"{key[:32]}.json"

    def read(self) -> Tuning | None:
        """What is stored; None for nothing that this version, machine and store can use."""
        document = read_kept(self.path)
        tuning = document.pop("tuning", None) if isinstance(document, dict) else None
        if document != self._head:
            return None
        try:
            return rebuild(Tuning, tuning)
        except (ValueError, OptionError):
            return None

    def write(self, tuning: Tuning) -> None:
        """Store it, in the place of what was there. Raises OSError where that cannot be done."""
        put_in_place(self.path, {**self._head, "tuning": asdict(tuning)}, indent=1)

    def forget(self) -> bool:
        """Remove it; whether there was a file."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
            return True
        return False


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
