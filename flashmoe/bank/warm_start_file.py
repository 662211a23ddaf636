"""Which records a store's banks held when it was last run, in a small file of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashmoe.base.json_cache import read_kept, write_kept
from flashmoe.store.manifest import MANIFEST_NAME
from flashmoe.store.reader import Store
from flashmoe.store.writer import sha256_file

VERSION = 1

# Per MoE layer, records by their number, the most valuable first.
Records = tuple[tuple[int, ...], ...]


class WarmStartFile:
    """What is remembered of one store, which its manifest's SHA-256 identifies, under `folder`.

    The file is {"version": 1, "store": SHA-256, "layers": [[record, ...], ...]}. Anything else
    counts as no file and is replaced by the next `write`.
    """

    def __init__(self, folder: Path, store: Store) -> None:
        self._store = sha256_file(store.file(MANIFEST_NAME))
        self._n_records = [layer.layout.n_experts for layer in store.manifest.layers]
        self.path = folder / f"{self._store[:32]}.json"

    def read(self) -> Records | None:
        """The records per layer; None when nothing is remembered, or nothing that makes sense."""
        content = read_kept(self.path)
        if not isinstance(content, dict) or set(content) != {"version", "store", "layers"}:
            return None
        layers = content["layers"]
        if content["version"] != VERSION or content["store"] != self._store:
            return None
        if not isinstance(layers, list) or len(layers) != len(self._n_records):
            return None
        if not all(map(_are_records, layers, self._n_records)):
            return None
        return tuple(map(tuple, layers))

    def write(self, layers: Sequence[Sequence[int]]) -> None:
        """Remember the banks' records, the most valuable first. Behind them stays what was
        remembered before, so that a run with little memory does not make a larger one forget."""
        before = self.read() or ((),) * len(layers)
        merged = [
            [*now, *(record for record in old if record not in set(now))]
            for now, old in zip(layers, before, strict=True)
        ]
        write_kept(self.path, {"version": VERSION, "store": self._store, "layers": merged})


def _are_records(records: Any, n_records: int) -> bool:
    return (
        isinstance(records, list)
        and all(type(record) is int and 0 <= record < n_records for record in records)
        and len(set(records)) == len(records)
    )
