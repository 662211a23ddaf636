"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

# What is done, and of how much.
Progress = Callable[[int, int], None]
# The share that is done, from 0 to 1.
ShareProgress = Callable[[float], None]
