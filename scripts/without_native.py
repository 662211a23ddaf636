"""Run a flashmoe command as it runs where there was no C++ compiler.

    python scripts/without_native.py bench decode big.flashmoe --memory 1300MB --cgroup 1500MB

The command gets a copy of the package that lacks the native library; so do processes it starts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import flashmoe

# Exit code 3 when the library was found all the same.
COMMAND = """
import sys
from flashmoe import native
from flashmoe.cli.main import main
sys.exit(3) if native.available() is None else main()
"""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="flashmoe-") as folder:
        shutil.copytree(
            Path(flashmoe.__file__).parent,
            Path(folder, "flashmoe"),
            ignore=shutil.ignore_patterns("*.so", "__pycache__"),
        )
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *sys.argv[1:]],
            # Safe paths: not the package of the folder that this is run in.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"},
            check=False,
        )
    if done.returncode == 3:
        sys.exit("error: the run that should lack the native library found it")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
