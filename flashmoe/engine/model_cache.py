"""Where models are: stores as they are, checkpoints repacked into the cache folder on first use."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from flashmoe.base.errors import OptionError
from flashmoe.base.progress import Progress
from flashmoe.checkpoint.source import Checkpoint, hub_commit, is_hub_id, resolve
from flashmoe.demo import DEMO_FOLDER
from flashmoe.repacking.presets import choose_recipe
from flashmoe.repacking.recipe import Recipe
from flashmoe.repacking.repack import repack
from flashmoe.store.reader import Store, is_incomplete, is_store, open_store

CACHE_FOLDER = Path("~/.cache/flashmoe")


def open_model(
    path_or_id: str | Path | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    resident_bits: int | None = None,
    method: str | None = None,
    recipe: str | Path | Recipe | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Store:
    """The store of a model, repacked into the cache folder when it is a checkpoint.

    None means the bundled demo model. A Hub id whose store is in the cache folder is not
    downloaded again, nor needed when the Hub is out of reach. Raises OptionError when a
    precision is asked of something that is already a store.
    """
    source = DEMO_FOLDER if path_or_id is None else path_or_id
    folder = Path(source).expanduser()
    if is_store(folder) or is_incomplete(folder):
        if any(x is not None for x in (bits, group_size, resident_bits, method, recipe)):
            raise OptionError(f"{folder} is a store: its bits are fixed; repack the checkpoint")
        return open_store(folder)
    packing: dict[str, Any] = {
        "bits": bits,
        "group_size": group_size,
        "resident_bits": resident_bits,
        "method": method,
        "recipe": recipe,
    }
    precision = _precision(**packing)
    if not folder.exists() and is_hub_id(str(source)):
        cached = _find_hub_store(str(source), revision, precision)
        if cached is not None:
            return open_store(cached)
    checkpoint = resolve(source, revision)
    cached = cache_path(checkpoint, precision)
    if is_store(cached):
        return open_store(cached)
    return repack(
        checkpoint.folder if checkpoint.revision is None else source,
        cached,
        revision=checkpoint.revision,
        progress=progress,
        **packing,
    )


def _precision(*, method: str | None, recipe: str | Path | Recipe | None, **plain: Any) -> str:
    """A short name of what is asked for, a different one for every recipe."""
    chosen = choose_recipe(recipe, method=method, **plain)
    if recipe is not None:
        return chosen.key
    words = [*plain.values(), *([method] if method else [])]
    return "-".join(str(value or "as") for value in words)


def cache_path(checkpoint: Checkpoint, precision: str) -> Path:
    """The place of a checkpoint's store: named after the commit it came from, or after a digest
    of a folder's path and of its files' sizes and times."""
    version = checkpoint.revision
    if version is None:
        files = [file.path for file in checkpoint.weight_files if file.path is not None]
        files += checkpoint.copied_files
        stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        identity = json.dumps([str(checkpoint.folder.resolve()), stamps])
        version = hashlib.sha256(identity.encode()).hexdigest()
    return cache_folder() / f"{_prefix(checkpoint.repo)}{version[:12]}-{precision}.flashmoe"


def _find_hub_store(repo: str, revision: str | None, precision: str) -> Path | None:
    """The cached store of a Hub model at its current commit, the newest one when the Hub does
    not answer."""
    commit = hub_commit(repo, revision)
    version = commit[:12] if commit else "*" if revision is None else f"{revision[:12]}*"
    found = cache_folder().glob(f"{_prefix(repo)}{version}-{precision}.flashmoe")
    stores = [path for path in found if is_store(path)]
    return max(stores, key=lambda path: path.stat().st_mtime_ns, default=None)


def _prefix(repo: str) -> str:
    return f"{repo.replace('/', '--')}-"


def cache_folder() -> Path:
    """Where stores of checkpoints and the verdicts of kernel checks are kept."""
    return CACHE_FOLDER.expanduser()


def lock_folder() -> Path:
    """Where it says which process runs which store."""
    return cache_folder() / "locks"
