"""Where a checkpoint comes from: a local folder or the Hugging Face Hub."""

from __future__ import annotations

import fnmatch
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flashmoe.base.errors import SourceError
from flashmoe.checkpoint.files import LocalFile, SourceFile, header_of
from flashmoe.checkpoint.headers import TensorInfo
from flashmoe.checkpoint.hub import HubFile, endpoint

# Everything of a checkpoint that is neither weights nor code, and the licences that must travel.
COPIED_PATTERNS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*LICENSE*",
    "NOTICE*",
)
HUB_TIMEOUT_SECONDS = 10.0
HEADERS_AT_ONCE = 8
WEIGHT_PATTERN = "model*.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: its small files in a folder, its weights there too or on the Hub.

    `repo` is its Hub id or its folder's name, `revision` a commit. `elsewhere` has the weight
    files where not all of them are in the folder, wherever each of them is.
    """

    folder: Path
    repo: str
    revision: str | None = None
    elsewhere: tuple[SourceFile, ...] = ()

    @property
    def weight_files(self) -> list[SourceFile]:
        """In the order of their names, which is the order of their tensors."""
        return list(self.elsewhere) or [
            LocalFile(path) for path in sorted(self.folder.glob(WEIGHT_PATTERN))
        ]

    @property
    def where(self) -> str:
        """What to call it: its folder, or its Hub id."""
        return str(self.folder) if self.revision is None else self.repo

    @property
    def copied_files(self) -> list[Path]:
        found = {path for pattern in COPIED_PATTERNS for path in self.folder.glob(pattern)}
        return sorted(
            path for path in found if path.is_file() and not path.name.endswith(".index.json")
        )


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a Hub id, owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None


def hub_commit(repo: str, revision: str | None = None) -> str | None:
    """The commit that a Hub model's revision stands for now, or None when the Hub does not say
    (out of reach, no such model, no access)."""
    from huggingface_hub import HfApi

    try:
        api = HfApi(endpoint=endpoint())
        return api.model_info(repo, revision=revision, timeout=HUB_TIMEOUT_SECONDS).sha
    except Exception:  # whatever it is, `resolve` meets it again and says so
        return None


def resolve(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint: a folder as it is, a Hub id with its small files in the Hub cache.

    Weight files that the Hub cache has are used; no other is downloaded. Raises SourceError when
    there is neither folder nor model, or when the Hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return Checkpoint(folder, folder.resolve().name)
    if folder.exists() or not is_hub_id(str(source)):
        raise SourceError(
            f"{source} is neither a checkpoint folder nor a Hub id such as Qwen/Qwen3-30B-A3B"
        )
    try:
        return _on_the_hub(str(source), revision)
    except (KeyboardInterrupt, SourceError):
        raise
    except Exception as error:  # the Hub client raises a dozen unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        cached = _in_the_cache(str(source), revision)
        if cached is not None:
            return cached
        raise SourceError(f"{source} cannot be fetched from the Hub: {reason}") from error


def _on_the_hub(repo: str, revision: str | None) -> Checkpoint:
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    info = HfApi(endpoint=endpoint()).model_info(
        repo, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT_SECONDS
    )
    commit = info.sha
    if commit is None:
        raise SourceError(f"the Hub does not say at which commit {repo} is")
    snapshot = snapshot_download(
        repo, revision=commit, allow_patterns=list(COPIED_PATTERNS), endpoint=endpoint()
    )
    files: list[SourceFile] = []
    for sibling in sorted(info.siblings or [], key=lambda sibling: sibling.rfilename):
        name = sibling.rfilename
        if not fnmatch.fnmatchcase(name, WEIGHT_PATTERN) or "/" in name:
            continue
        cached = try_to_load_from_cache(repo, name, revision=commit)
        if isinstance(cached, str):
            files.append(LocalFile(Path(cached)))
        elif sibling.size is None:
            raise SourceError(f"the Hub does not say how large {name} of {repo} is")
        else:
            sha256 = sibling.lfs.sha256 if sibling.lfs is not None else None
            blob = sibling.blob_id or ""
            files.append(HubFile(repo, commit, name, sibling.size, sha256, blob))
    if not files:
        raise SourceError(f"{repo} has no {WEIGHT_PATTERN} on the Hub; it holds no weights")
    return Checkpoint(Path(snapshot), repo, commit, tuple(files))


def _in_the_cache(repo: str, revision: str | None) -> Checkpoint | None:
    """What the Hub cache has of a model, if that is all of it; for when the Hub does not answer."""
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        checkpoint = Checkpoint(snapshot, repo, snapshot.name)
        check_files(checkpoint)
    except Exception:  # then the Hub's own answer is what counts
        return None
    return checkpoint


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a checkpoint: in which of its weight files, and where there."""

    file: int
    info: TensorInfo


def check_files(checkpoint: Checkpoint) -> dict[str, SourceTensor]:
    """Every tensor of the checkpoint by name, once each weight file is known to be whole.

    Of files on the Hub, only the headers are fetched. Raises SourceError naming a file that is
    missing or truncated.
    """
    files = checkpoint.weight_files
    index = checkpoint.folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            have = {file.name for file in files}
            missing = [
                name
                for name in listed
                if name not in have and not (checkpoint.folder / name).is_file()
            ]
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise SourceError(f"{index} is not a safetensors index") from None
        if missing:
            raise SourceError(f"{checkpoint.where} lacks {missing[0]}, which its index lists")
    if not files:
        raise SourceError(f"{checkpoint.folder} has no {WEIGHT_PATTERN}; it holds no weights")
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        headers = list(pool.map(header_of, files))
    return {
        name: SourceTensor(file, info)
        for file, header in enumerate(headers)
        for name, info in header.items()
    }
