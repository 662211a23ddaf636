"""Small JSON files that make the next run better and that no run depends on.

An unreadable file counts as absent; a failed write is ignored.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

T = TypeVar("T")

MOST_BYTES = 64 * 10**6


def read_kept(path: Path) -> Any:
    """What a file holds; None when there is none, or it is not JSON or absurdly large."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def write_kept(path: Path, value: Any, indent: int | None = None) -> None:
    """As `put_in_place`, where that can be done."""
    with contextlib.suppress(OSError):
        put_in_place(path, value, indent)


def put_in_place(path: Path, value: Any, indent: int | None = None) -> None:
    """Put a file in place as a whole: who reads it meanwhile finds the old one or the new one.

    Raises OSError where that cannot be done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=indent, sort_keys=True)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def rebuild(kind: type[T], value: Any) -> T:
    """A dataclass out of what `asdict` made of it, its fields being dataclasses, or of plain
    types that JSON has, or such a type or None.

    Raises ValueError for other fields or types, and what the dataclasses raise.
    """
    if is_dataclass(kind):
        fields = get_type_hints(kind)
        if not isinstance(value, dict) or set(value) != set(fields):
            raise ValueError(f"{value!r} does not have the fields of {kind.__name__}")
        return kind(**{name: rebuild(field, value[name]) for name, field in fields.items()})
    if type(value) not in (get_args(kind) or (kind,)):
        raise ValueError(f"{value!r} is not of type {kind}")
    found: T = value
    return found
