"""What a store is made from: SHA-256 of every source file, taken while tensors are written."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flashmoe.checkpoint.source import Checkpoint, hub_digest

CHUNK_BYTES = 8 * 2**20


class SourceHasher:
    """Hashes a checkpoint's files in a thread of its own (hashing releases the GIL)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flashmoe-hash")
        files = [*checkpoint.weight_files, *checkpoint.copied_files]
        self._digests = self._pool.submit(self._run, files)

    def result(self) -> dict[str, str]:
        """SHA-256 in hex by file name; waits for it. Raises OSError when a file is unreadable."""
        return self._digests.result()

    def close(self) -> None:
        """Stop, at once when there is still something to hash."""
        self._stopped.set()
        self._pool.shutdown()

    def _run(self, files: list[Path]) -> dict[str, str]:
        # The Hub cache names large files by their hash already.
        return {path.name: hub_digest(path) or self._hash(path) for path in files}

    def _hash(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while not self._stopped.is_set() and (chunk := file.read(CHUNK_BYTES)):
                digest.update(chunk)
        return digest.hexdigest()
