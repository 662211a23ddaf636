"""Run mixture-of-experts models far larger than memory, exactly, from the SSD.

    from flashmoe import FlashMoEModel

    with FlashMoEModel.from_pretrained("path or Hub id", memory="24GB") as model:
        print(model.generate("What is the capital of the United States?"))

Names are loaded when first used: importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmoe.bank.stats import Stats
    from flashmoe.base.errors import (
        FlashMoEError,
        MemoryBudgetError,
        OptionError,
        PromptError,
        ReadError,
        SourceError,
        StoreError,
        StoreInUseError,
    )
    from flashmoe.engine.api import FlashMoEModel
    from flashmoe.engine.options import Options
    from flashmoe.generation.session import Piece, Sampling, Session
    from flashmoe.repacking.repack import repack
    from flashmoe.store.inspect import StoreSummary, inspect
    from flashmoe.store.verify import VerifyReport, verify

__all__ = [
    "FlashMoEError",
    "FlashMoEModel",
    "MemoryBudgetError",
    "OptionError",
    "Options",
    "Piece",
    "PromptError",
    "ReadError",
    "Sampling",
    "Session",
    "SourceError",
    "Stats",
    "StoreError",
    "StoreInUseError",
    "StoreSummary",
    "VerifyReport",
    "inspect",
    "repack",
    "verify",
]

_HOMES = {
    "FlashMoEModel": "engine.api",
    "Options": "engine.options",
    "Piece": "generation.session",
    "Sampling": "generation.session",
    "Session": "generation.session",
    "Stats": "bank.stats",
    "StoreSummary": "store.inspect",
    "VerifyReport": "store.verify",
    "inspect": "store.inspect",
    "repack": "repacking.repack",
    "verify": "store.verify",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("flashmoe")
    if name not in __all__:
        raise AttributeError(f"module 'flashmoe' has no attribute {name!r}")
    module = importlib.import_module(f"flashmoe.{_HOMES.get(name, 'base.errors')}")
    return getattr(module, name)
