"""The native reader pool under sanitizers, on its own, without Python."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flashmoe import native
from flashmoe.base.errors import OptionError
from flashmoe.io.native import NativeReader
from flashmoe.native import build
from tests.support.natives import QUIET_SANITIZERS

SOURCES = ("reader.cpp", "read_pool.cpp", "transfer.cpp")
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    compiler = build.find_compiler()
    if compiler is None:
        assert native.available() is not None
        return
    folder = Path(build.__file__).parent
    files = [
        Path(__file__).parents[1] / "native" / "reader_check.cpp",
        *(folder / name for name in SOURCES),
    ]
    program = tmp_path / "reader_check"
    command = [compiler, *build.FLAGS, *SANITIZERS, f"-I{folder}", *files, "-o", program]
    subprocess.run(command, check=True)
    command = [program, tmp_path / "file"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=QUIET_SANITIZERS
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("uncached 1") == 2


def test_without_the_library() -> None:
    if native.available() is None:
        return
    with pytest.raises(OptionError, match="was not built"):
        NativeReader()
