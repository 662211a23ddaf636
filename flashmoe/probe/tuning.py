"""What was measured to be fastest for a store on a machine, remembered in a JSON file.

The file is a convenience: one that cannot be read, or is of another version, machine or store,
counts as absent. Nothing in it changes a result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from flashmoe.base import machine
from flashmoe.base.errors import OptionError
from flashmoe.io.depth import Depth
from flashmoe.io.select import ReadSettings, resolve_reader
from flashmoe.store.manifest import MANIFEST_NAME
from flashmoe.store.reader import Store

T = TypeVar("T")

VERSION = 1
FOLDER = "tuning"
# What was best for a bank is taken to be so for banks up to that much larger or smaller.
SIMILAR = 1.25


@dataclass(frozen=True)
class Reads:
    """How records are read: `decode` the few that a token misses, `prefill` a prompt's many."""

    decode: ReadSettings = field(default_factory=ReadSettings)
    prefill: ReadSettings = field(default_factory=ReadSettings)


@dataclass(frozen=True)
class BankChoice:
    """What was best with the model running, where memory allowed a bank of `bank_bytes`.

    The bank takes `bank_share` of what it could have, above 0 and at most 1; with `page_cache`
    the operating system keeps what it likes in the memory that is left. Raises OptionError for
    numbers out of range.
    """

    bank_bytes: int
    bank_share: float
    page_cache: bool
    prefetch: bool

    def __post_init__(self) -> None:
        if not 0 < self.bank_share <= 1:
            raise OptionError(f"the bank's share must be above 0 and at most 1: {self.bank_share}")

    def holds_for(self, bank_bytes: int) -> bool:
        """Whether it says anything about memory that allows a bank of `bank_bytes`."""
        return self.bank_bytes / SIMILAR <= bank_bytes <= self.bank_bytes * SIMILAR


@dataclass(frozen=True)
class Choice:
    """Settings that the engine takes for what its user left open.

    `cached` and `uncached` are those of reading through the page cache and past it; `bank` is
    None where no model was run. Raises OptionError for a reader that cannot do what it is for.
    """

    cached: Reads = field(default_factory=Reads)
    uncached: Reads = field(default_factory=Reads)
    bank: BankChoice | None = None

    def __post_init__(self) -> None:
        for settings in (self.uncached.decode, self.uncached.prefill):
            resolve_reader(settings.reader, page_cache=False)

    def reads(self, page_cache: bool) -> Reads:
        """The settings of reading through the page cache, or past it."""
        return self.cached if page_cache else self.uncached


@dataclass(frozen=True)
class Tuning:
    """A choice, and what was measured with it.

    `bytes_per_second` from the disk in decode's pattern; `tokens_per_second` None where no
    model was run. `when` is the date and time, ISO 8601 in UTC.
    """

    choice: Choice
    bytes_per_second: float
    tokens_per_second: float | None
    when: str


class TuningFile:
    """The place of one store's tuning on this machine, in a cache folder."""

    def __init__(self, cache_folder: Path, store: Store) -> None:
        self._machine = asdict(machine.describe(store.path))
        self._store = _digest((store.path / MANIFEST_NAME).read_bytes())
        key = _digest(json.dumps([self._machine, self._store], sort_keys=True).encode())
        self.path = cache_folder / FOLDER / f"{key[:32]}.json"

    def read(self) -> Tuning | None:
        """What is stored; None for nothing that this version, machine and store can use."""
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            fields = _Fields(document, "version", "machine", "store", "tuning")
            if fields["version"] != VERSION or isinstance(fields["version"], bool):
                return None
            if (fields["machine"], fields["store"]) != (self._machine, self._store):
                return None
            return _tuning(fields["tuning"])
        except (OSError, ValueError, RecursionError, OptionError):
            return None

    def write(self, tuning: Tuning) -> None:
        """Store it, in the place of what was there. Raises OSError where that cannot be done."""
        document = {
            "version": VERSION,
            "machine": self._machine,
            "store": self._store,
            "tuning": asdict(tuning),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(document, file, indent=1)
            Path(name).replace(self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def forget(self) -> bool:
        """Remove it; whether there was a file."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
            return True
        return False


def parse_choice(document: Any) -> Choice:
    """A choice out of parsed JSON. Raises ValueError or OptionError when it is none."""
    fields = _Fields(document, "cached", "uncached", "bank")
    return Choice(
        cached=_reads(fields["cached"]),
        uncached=_reads(fields["uncached"]),
        bank=_maybe(_bank, fields["bank"]),
    )


def _tuning(document: Any) -> Tuning:
    fields = _Fields(document, "choice", "bytes_per_second", "tokens_per_second", "when")
    return Tuning(
        choice=parse_choice(fields["choice"]),
        bytes_per_second=_number(fields["bytes_per_second"]),
        tokens_per_second=_maybe(_number, fields["tokens_per_second"]),
        when=_typed(str, fields["when"]),
    )


def _reads(document: Any) -> Reads:
    fields = _Fields(document, "decode", "prefill")
    return Reads(_settings(fields["decode"]), _settings(fields["prefill"]))


def _settings(document: Any) -> ReadSettings:
    fields = _Fields(document, "reader", "depth")
    depth = _Fields(fields["depth"], "threads", "piece_bytes")
    return ReadSettings(
        _typed(str, fields["reader"]),
        Depth(_count(depth["threads"]), _maybe(_count, depth["piece_bytes"])),
    )


def _bank(document: Any) -> BankChoice:
    fields = _Fields(document, "bank_bytes", "bank_share", "page_cache", "prefetch")
    return BankChoice(
        bank_bytes=_count(fields["bank_bytes"]),
        bank_share=_number(fields["bank_share"]),
        page_cache=_typed(bool, fields["page_cache"]),
        prefetch=_typed(bool, fields["prefetch"]),
    )


class _Fields:
    """An object with exactly these names. Raises ValueError for anything else."""

    def __init__(self, document: Any, *names: str) -> None:
        if not isinstance(document, dict) or set(document) != set(names):
            raise ValueError(f"not an object of {names}")
        self._document = document

    def __getitem__(self, name: str) -> Any:
        return self._document[name]


def _maybe(parse: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else parse(value)


def _typed(kind: type[T], value: Any) -> T:
    if type(value) is not kind:
        raise ValueError(f"{value!r} is not of type {kind.__name__}")
    return value


def _count(value: Any) -> int:
    if _typed(int, value) <= 0:
        raise ValueError(f"{value} is not above 0")
    return int(value)


def _number(value: Any) -> float:
    number = float(value) if type(value) is int else _typed(float, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{number} is not a number above 0")
    return number


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
