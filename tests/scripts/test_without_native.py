"""The script that runs commands without the native library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from flashmoe.demo import DEMO_FOLDER

SCRIPT = str(Path(__file__).parents[2] / "scripts" / "without_native.py")


def test_commands_lack_the_library(home: Path) -> None:
    command = [sys.executable, SCRIPT, "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["kernel"] == "reference"


def test_exit_codes_come_through(home: Path) -> None:
    command = [sys.executable, SCRIPT, "inspect", str(DEMO_FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("flashmoe: ")
