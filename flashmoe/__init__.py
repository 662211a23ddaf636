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
    from flashmoe.engine.api import FlashMoEModel, plan_run
    from flashmoe.engine.options import Options
    from flashmoe.engine.plan import RunPlan
    from flashmoe.generation.report import Report
    from flashmoe.generation.session import Answer, Piece, Sampling, Session
    from flashmoe.repacking.repack import repack
    from flashmoe.store.inspect import StoreSummary, inspect
    from flashmoe.store.verify import VerifyReport, verify

__all__ = [
    "Answer",
    "FlashMoEError",
    "FlashMoEModel",
    "MemoryBudgetError",
    "OptionError",
    "Options",
    "Piece",
    "PromptError",
    "ReadError",
    "Report",
    "RunPlan",
    "Sampling",
    "Session",
    "SourceError",
    "StoreError",
    "StoreInUseError",
    "StoreSummary",
    "VerifyReport",
    "inspect",
    "plan_run",
    "repack",
    "verify",
]

_HOMES = {
    "Answer": "generation.session",
    "FlashMoEModel": "engine.api",
    "Options": "engine.options",
    "Piece": "generation.session",
    "Report": "generation.report",
    "RunPlan": "engine.plan",
    "Sampling": "generation.session",
    "Session": "generation.session",
    "StoreSummary": "store.inspect",
    "VerifyReport": "store.verify",
    "inspect": "store.inspect",
    "plan_run": "engine.api",
    "repack": "repacking.repack",
    "verify": "store.verify",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from flashmoe.base.distribution import installed_version

        return installed_version()
    if name not in __all__:
        raise AttributeError(f"module 'flashmoe' has no attribute {name!r}")
    module = importlib.import_module(f"flashmoe.{_HOMES.get(name, 'base.errors')}")
    return getattr(module, name)
