"""Rope settings under the keys that families read: each function adds them to a config in place.

transformers 5 states them as one table, `rope_parameters` {rope_theta, rope_type, factor, ...},
or as one such table per layer type; older checkpoints state `rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

import math
from typing import Any

Config = dict[str, Any]


def state_as_table(config: Config, table: Any) -> None:
    """State older keys as transformers 5 does (`table` is its own reading of them)."""
    if isinstance(table, dict):
        config["rope_parameters"] = table


def state_yarn_scale(config: Config) -> None:
    """State YaRN's `attention_factor`, which mlx-lm does not read, as the `mscale` it does."""

    def scaled(table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        if table and all(isinstance(value, dict) for value in table.values()):
            return {kind: scaled(value) for kind, value in table.items()}
        stated, factor = table.get("attention_factor"), table.get("factor") or 1
        yarn = "yarn" in (table.get("rope_type"), table.get("type"))
        if not yarn or stated is None or factor <= 1 or "mscale" in table:
            return table
        return {**table, "mscale": (stated - 1) / (0.1 * math.log(factor))}

    for key in ("rope_parameters", "rope_scaling"):
        if key in config:
            config[key] = scaled(config[key])


def state_flat(config: Config) -> None:
    """Flatten `rope_parameters` {rope_theta, rope_type, factor, ...} into the older keys.

    A table per layer type has no flat form; there, only a theta that all types share is.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    if rope and all(isinstance(value, dict) for value in rope.values()):
        thetas = {value.get("rope_theta") for value in rope.values()}
        if len(thetas) == 1 and None not in thetas:
            config.setdefault("rope_theta", thetas.pop())
        return
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            config.setdefault(key, rope[key])
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    config.setdefault(
        "rope_scaling", None if kind == "default" else {**scaling, "type": kind, "rope_type": kind}
    )
