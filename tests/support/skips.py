"""The only way for a test to be skipped: by what it needs and this machine lacks."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable

import pytest

from flashmoe.bench import cgroup
from flashmoe.native.build import find_compiler


def _on_path(tool: str) -> Callable[[], bool]:
    return lambda: shutil.which(tool) is not None


# What tests may need, and how to ask whether it is here. None: only the test itself can tell.
NEEDS: dict[str, Callable[[], bool] | None] = {
    "clang++": _on_path("clang++"),
    "mount": _on_path("mount"),
    "nvcc": _on_path("nvcc"),
    "a C++ compiler": lambda: find_compiler() is not None,
    "Linux": lambda: sys.platform == "linux",
    "root and a memory cgroup": lambda: os.access(cgroup.V1, os.W_OK),
    "GCC 12 or Clang": None,
    "a page cache that can be emptied": None,
    "files with holes": None,
    "native SHA-256": None,
    "permission to mount": None,
    "uncached reads": None,
}


def reason(what: str) -> str:
    """What a test that is skipped for want of `what` says."""
    return f"needs {what}"


def problem(said: str) -> str | None:
    """What is wrong with tests being skipped for this reason on this machine."""
    what = {reason(what): what for what in NEEDS}.get(said)
    if what is None:
        return "not one of NEEDS; skip by tests/support/skips.py"
    probe = NEEDS[what]
    return "it is here: these tests could have run" if probe is not None and probe() else None


def needs(what: str, met: bool | None = None) -> pytest.MarkDecorator:
    """Marks a test that needs one of NEEDS; `met` says whether it is here, if NEEDS does not."""
    return pytest.mark.skipif(not _met(what, met), reason=reason(what))


def require(what: str, met: bool | None = None) -> None:
    """Skips the test that runs unless one of NEEDS is here; `met` as for `needs`."""
    if not _met(what, met):
        pytest.skip(reason(what))


def _met(what: str, met: bool | None) -> bool:
    probe = NEEDS[what]
    if met is not None:
        return met
    assert probe is not None, f"only the test can tell whether there is {what}: give met"
    return probe()
