"""Small JSON files that make the next run better and that no run depends on.

One that cannot be read counts as absent, and one that cannot be written is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

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
    """Put a file in place as a whole: who reads it meanwhile finds the old one or the new one."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(value, file, indent=indent, sort_keys=True)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
