"""The script that runs commands without the native library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import without_native

from flashmoe.demo import DEMO_FOLDER


def test_commands_lack_the_library(home: Path) -> None:
    command = [sys.executable, without_native.__file__, "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["kernel"] == "reference"


def test_exit_codes_come_through(home: Path) -> None:
    command = [sys.executable, without_native.__file__, "inspect", str(DEMO_FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("flashmoe: ")
