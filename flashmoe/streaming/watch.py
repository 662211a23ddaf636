"""Who is told what a model's streamed layers do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt


@dataclass
class LayerWatch:
    """Shared by the streamed layers of one model; None is nobody.

    `routed(layer, experts)` is called with each call's routed experts [..., k], `layer` counting
    streamed layers from 0; `done()` when the layer's experts are done.
    """

    routed: Callable[[int, npt.NDArray[Any]], None] | None = None
    done: Callable[[], None] | None = None
