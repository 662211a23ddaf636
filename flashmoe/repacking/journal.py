"""What an unfinished store holds that is whole: a text file beside it, one line per step.

A line is the CRC-32 of a JSON object and the object. It is added, and on disk, only after what
it speaks of is; a line that is torn ends the journal. The first says what the run makes of which
source, the others how far it has come.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flashmoe.store.manifest import JOURNAL_NAME
from flashmoe.store.writer import sync_descriptor

Entry = dict[str, Any]


@dataclass
class Reached:
    """How far a run has come: `pieces` made, source file `file` read up to `position`, the state
    of its hash there, the CRC-32 of what was written (4 bytes each, in the order of the pieces),
    SHA-256 of the source files that are done and of the store's files that are."""

    pieces: int = 0
    file: int = 0
    position: int = 0
    state: bytes | None = None
    crcs: bytearray = field(default_factory=bytearray)
    sources: dict[str, str] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)

    def apply(self, entry: Entry) -> None:
        self.pieces = entry["pieces"]
        self.file = entry["file"]
        self.position = entry["position"]
        self.state = bytes.fromhex(entry["state"]) if entry["state"] else None
        del self.crcs[4 * entry["n_crcs"] :]
        self.crcs += bytes.fromhex(entry["crcs"])
        self.sources = entry["sources"]
        self.stored = entry["stored"]

    def entry(self, n_crcs: int, crcs: bytes) -> Entry:
        """The line that says this; it brings the CRC-32s after the first `n_crcs`."""
        return {
            "pieces": self.pieces,
            "file": self.file,
            "position": self.position,
            "state": self.state.hex() if self.state else None,
            "n_crcs": n_crcs,
            "crcs": crcs.hex(),
            "sources": dict(self.sources),
            "stored": dict(self.stored),
        }

    def copy(self) -> Reached:
        """What does not change while this does; without the CRC-32s."""
        return replace(self, crcs=bytearray(), sources=dict(self.sources), stored=dict(self.stored))


class Journal:
    """The journal of one unfinished store, open for adding lines to it."""

    def __init__(self, folder: Path) -> None:
        path = folder / JOURNAL_NAME
        entries, size_bytes = _read(path)
        self.entries = entries
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._descriptor, size_bytes)

    def add(self, entry: Entry) -> None:
        """Add a line; it is on disk when this returns."""
        text = json.dumps(entry, separators=(",", ":")).encode()
        line = memoryview(b"%08x %b\n" % (zlib.crc32(text), text))
        while line:
            line = line[os.write(self._descriptor, line) :]
        sync_descriptor(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def begun(folder: Path) -> Entry | None:
    """The first entry of the journal in a folder, or None when there is none."""
    entries, _ = _read(folder / JOURNAL_NAME)
    return entries[0] if entries else None


def _read(path: Path) -> tuple[list[Entry], int]:
    """The entries that are whole, and the bytes that they take."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    entries: list[Entry] = []
    size_bytes = 0
    for line in content.splitlines(keepends=True):
        crc, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
            break
        entries.append(json.loads(text))
        size_bytes += len(line)
    return entries, size_bytes
