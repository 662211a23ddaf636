"""A config whose model routes every token to fewer experts than it was trained with."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from flashmoe.base.errors import OptionError, SourceError
from flashmoe.checkpoint.architecture import Routing, build_model, probe_routing
from flashmoe.checkpoint.config import SYNONYMS, Config

# All names under which a family of mlx-lm or transformers states its top-k.
TOP_K_KEYS = (
    *next(group for group in SYNONYMS if "num_experts_per_tok" in group),
    "experts_per_token",
    "moe_top_k",
)


def with_experts_per_token(config: Config, count: int, trained: Routing) -> tuple[Config, Routing]:
    """`config` with a top-k of `count` in every layer, and what a probe of it reveals.

    `trained` is what a probe of `config` revealed. Raises OptionError when `count` is not from 1
    to the trained top-k, or when this family's top-k does not follow its config.
    """
    most = min(trained.top_k.values())
    if not 1 <= count <= most:
        raise OptionError(
            f"experts per token must be from 1 to {most}, which this model was trained with, "
            f"not {count}"
        )
    if set(trained.top_k.values()) == {count}:
        return config, trained
    changed = _with_top_k(config, count)
    try:
        routing = probe_routing(changed)
        follows = set(routing.top_k.values()) == {count} and _shapes(changed) == _shapes(config)
    except SourceError:
        follows = False
    if not follows:
        raise OptionError(
            f"the number of experts per token of {config['model_type']} models is not set by their "
            "config alone; leave --experts-per-token out"
        )
    return changed, routing


def _with_top_k(config: Config, count: int) -> Config:
    """Every name set on each level that describes a language model: families ignore the names
    that they do not know, and may have defaults for the one that they do."""
    nested = {
        key: _with_top_k(value, count)
        for key, value in config.items()
        if isinstance(value, dict) and key.endswith("_config") and "hidden_size" in value
    }
    return {**config, **nested, **dict.fromkeys(TOP_K_KEYS, count)}


def _shapes(config: Config) -> dict[str, Any]:
    model: nn.Module = build_model(config)[0]
    flat: Any = tree_flatten(model.parameters())
    return {name: array.shape for name, array in flat}
