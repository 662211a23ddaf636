"""What kernel checks found, remembered between runs in a JSON file (see `keeping`)."""

from __future__ import annotations

from pathlib import Path

from flashmoe.base.json_cache import read_kept, write_kept

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
            write_kept(self._path, self._found, indent=1)


def _read(path: Path | None) -> dict[str, str]:
    content = None if path is None else read_kept(path)
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if isinstance(value, str)}
