"""The name this package is installed under, which differs from the name it is imported by."""

from __future__ import annotations

from importlib.metadata import version

# `flashmoe` on the package index is somebody else's project.
DISTRIBUTION = "flashmoe-mlx"


def installed_version() -> str:
    """The version that is installed here, as "0.1.0"."""
    return version(DISTRIBUTION)
