"""Build the wheel, install it alone in an empty environment, and run it there.

Proves that what users install is complete: the Metal sources and the demo model are inside,
every dependency is declared, and nothing needs the source tree.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = (
    "flashmoe/py.typed",
    "flashmoe/metal/README.md",
    "flashmoe/native/libflashmoe.so",
    "flashmoe/demo/model.safetensors",
    "flashmoe/demo/tokenizer.json",
    "flashmoe/demo/chat_template.jinja",
    "flashmoe/demo/WORDNET-LICENSE",
)
QUESTION = "What is the capital of the United States?"


def run(*command: str | Path, home: Path) -> str:
    """Run a command outside the source tree; fails loudly."""
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": ""}
    result = subprocess.run(
        [str(part) for part in command], cwd=home, env=environment, text=True, capture_output=True
    )
    if result.returncode:
        sys.exit(f"{command} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def check_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in ROOT.glob("metal/*"):
        if f"flashmoe/metal/{path.name}" not in names:
            sys.exit(f"{wheel.name} lacks flashmoe/metal/{path.name}")
    for path in ROOT.glob("flashmoe/**/*.py"):
        if str(path.relative_to(ROOT)) not in names:
            sys.exit(f"{wheel.name} lacks {path.relative_to(ROOT)}")
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        sys.exit(f"{wheel.name} lacks {missing}")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run(
            [sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", ROOT],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (wheel,) = (folder / "dist").glob("*.whl")
        check_contents(wheel)
        venv.create(folder / "venv", with_pip=True)
        home = folder / "home"
        home.mkdir()
        binaries = folder / "venv" / "bin"
        run(binaries / "python", "-m", "pip", "install", "--quiet", wheel, home=home)
        answer = run(binaries / "flashmoe", "generate", "-p", QUESTION, "--cache", "2MB", home=home)
        if answer.strip() != "Washington.":
            sys.exit(f"the installed wheel answers {answer!r}")
        size = wheel.stat().st_size
        print(f"{wheel.name}: {size / 1e6:.1f} MB, installs and answers on its own")


if __name__ == "__main__":
    main()
