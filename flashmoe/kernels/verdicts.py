"""What kernel checks found, remembered between runs in a JSON file.

The file is a convenience: one that cannot be read counts as empty, and one that cannot be
written is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path

PASSED = "passed"


class Verdicts:
    """Verdicts by key: PASSED, or what was wrong. `path` None keeps them in this object alone."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found = _read(path)

    def get(self, key: str) -> str | None:
        return self._found.get(key)

    def put(self, key: str, verdict: str) -> None:
        """Remember; what another process has added to the file in the meantime is kept."""
        self._found = _read(self._path) | self._found | {key: verdict}
        if self._path is not None:
            with contextlib.suppress(OSError):
                _write(self._path, self._found)


def _read(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if isinstance(value, str)}


def _write(path: Path, found: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1, sort_keys=True)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
