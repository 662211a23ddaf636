"""What tests of the native library share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from flashmoe import native
from flashmoe.base.errors import OptionError

# macOS's allocator says on stderr that it makes room for the address sanitizer.
QUIET_SANITIZERS = {**os.environ, "MallocNanoZone": "0"}

ISAS = ("avx512", "avx2", "neon", "portable")


def compiled(test: Callable[..., None]) -> Callable[..., None]:
    """The test where there is a library; elsewhere, that the library says why it is not there."""

    @functools.wraps(test)
    def without(*args: Any, **kwargs: Any) -> None:
        assert "was not built" in str(native.available())

    return test if native.available() is None else without


def isas_here() -> list[str]:
    """The instruction sets that run on this machine."""
    found = []
    for name in ISAS:
        try:
            native.use_isa(name)
        except OptionError:
            continue
        found.append(name)
    return found
