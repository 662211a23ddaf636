"""Where a checkpoint comes from: a local folder or the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from flashmoe.checkpoint.headers import TensorInfo, read_header
from flashmoe.errors import SourceError

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
WEIGHT_PATTERN = "model*.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this disk; `repo` is its Hub id or its folder's name."""

    folder: Path
    repo: str
    revision: str | None = None

    @property
    def weight_files(self) -> list[Path]:
        return sorted(self.folder.glob(WEIGHT_PATTERN))

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
    from huggingface_hub import model_info

    try:
        return model_info(repo, revision=revision, timeout=HUB_TIMEOUT_SECONDS).sha
    except Exception:  # whatever it is, `resolve` meets it again and says so
        return None


def resolve(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint: a folder as it is, a Hub id by way of the local Hub cache.

    Raises SourceError when there is neither, or when the Hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return Checkpoint(folder, folder.resolve().name)
    if folder.exists() or not is_hub_id(str(source)):
        raise SourceError(
            f"{source} is neither a checkpoint folder nor a Hub id such as Qwen/Qwen3-30B-A3B"
        )
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(
            snapshot_download(
                str(source),
                revision=revision,
                allow_patterns=[*COPIED_PATTERNS, WEIGHT_PATTERN],
            )
        )
    except KeyboardInterrupt:
        raise
    except Exception as error:  # the Hub client raises a dozen unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(f"{source} cannot be fetched from the Hub: {reason}") from error
    return Checkpoint(snapshot, str(source), snapshot.name)


def check_files(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint by name, once each weight file is known to be whole.

    Raises SourceError naming a file that is missing or truncated.
    """
    index = checkpoint.folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            missing = [name for name in listed if not (checkpoint.folder / name).is_file()]
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise SourceError(f"{index} is not a safetensors index") from None
        if missing:
            raise SourceError(f"{checkpoint.folder} lacks {missing[0]}, which its index lists")
    if not checkpoint.weight_files:
        raise SourceError(f"{checkpoint.folder} has no {WEIGHT_PATTERN}; it holds no weights")
    tensors: dict[str, TensorInfo] = {}
    for path in checkpoint.weight_files:
        tensors.update(read_header(path))
    return tensors


def hub_digest(path: Path) -> str | None:
    """The SHA-256 by which the Hub cache names a large file, or None for any other file."""
    blob = path.resolve()
    is_blob = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    return blob.name if is_blob else None
