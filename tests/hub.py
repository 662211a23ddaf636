"""A stand-in for the Hugging Face Hub."""

import shutil
from pathlib import Path
from types import SimpleNamespace

from checkpoints import save_speaking

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEWER = "fedcba9876543210fedcba9876543210fedcba98"


class Hub:
    """One model, whatever it is called, at a commit that can move; it can be out of reach.

    `downloads` are the repo and the revision of each download.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commit = COMMIT
        self.reachable = True
        self.downloads: list[tuple[str, str | None]] = []
        save_speaking(folder / "files", "qwen3_moe", bits=None)

    def model_info(self, repo: str, revision: str | None = None, **_: object) -> SimpleNamespace:
        self._answer()
        return SimpleNamespace(sha=self.commit)

    def snapshot_download(self, repo: str, revision: str | None = None, **_: object) -> str:
        self._answer()
        self.downloads.append((repo, revision))
        snapshot = self.folder / "snapshots" / self.commit
        shutil.copytree(self.folder / "files", snapshot, dirs_exist_ok=True)
        return str(snapshot)

    def _answer(self) -> None:
        if not self.reachable:
            raise ConnectionError("no route to host\nand a second line")
