"""A checkpoint's config.json, brought to the keys that its mlx-lm family expects.

transformers 5 writes rope settings under `rope_parameters` and renames or omits keys that
mlx-lm's model arguments require. Normalising only ever adds keys: arguments that a family does
not know are ignored by mlx-lm, and a key that is already there is never changed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashmoe.errors import SourceError

Config = dict[str, Any]

# Keys under which checkpoints state one and the same number.
SYNONYMS = (
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"),
    ("rms_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps", "layer_norm_eps"),
)

# Widths of parts that a model may do without; a config that leaves one out has no such part.
ABSENT_PARTS = ("shared_intermediate_size",)


def read_config(folder: Path) -> Config:
    """The parsed config.json of a checkpoint or store, eos ids of generation_config.json merged in.

    Raises SourceError when it is missing, is not JSON or names no `model_type`.
    """
    from mlx_lm.utils import load_config

    try:
        config = load_config(folder)
    except FileNotFoundError:
        raise SourceError(f"{folder} has no config.json; it is not a model checkpoint") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise SourceError(f"{folder / 'config.json'} cannot be read: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise SourceError(f"{folder / 'config.json'} names no model_type")
    return config


def normalize(config: Config) -> Config:
    """A copy of `config` with flat rope keys and every alias that transformers defines.

    Applied to the top level and to each nested text config.
    """
    levels = {
        key: normalize(value)
        for key, value in config.items()
        if isinstance(value, dict) and key.endswith("_config") and "hidden_size" in value
    }
    config = {**config, **levels}
    _add_rope(config)
    _add_layer_pattern(config)
    for alias, name in _aliases(config).items():
        for have, lack in ((alias, name), (name, alias)):
            if have in config and lack not in config:
                config[lack] = config[have]
    return config


def fill_missing(config: Config, names: list[str]) -> Config:
    """A copy of `config` in which each level that describes a language model has `names`.

    Raises SourceError naming a key that cannot be derived from the others.
    """
    config = dict(config)
    for name in names:
        derived = False
        for level in _levels(config):
            if name in level:
                continue
            value = _derive(level, name)
            if value is not None:
                level[name] = value
                derived = True
        if not derived:
            raise SourceError(
                f"config.json lacks {name!r}, which {config['model_type']} needs and which "
                "cannot be derived from its other keys"
            )
    return config


def missing_arguments(error: TypeError) -> list[str]:
    """The argument names in Python's own message about missing arguments, or nothing."""
    text = str(error)
    return re.findall(r"'(\w+)'", text) if "missing" in text and "argument" in text else []


def _levels(config: Config) -> Iterator[Config]:
    """The config itself and its nested text configs, the latter copied so they may be changed."""
    yield config
    for key, value in list(config.items()):
        if isinstance(value, dict) and key.endswith("_config") and "hidden_size" in value:
            config[key] = dict(value)
            yield config[key]


def _add_rope(config: Config) -> None:
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


def _add_layer_pattern(config: Config) -> None:
    """State what `layer_types` and `mlp_layer_types` list per layer as mlx-lm's numbers do."""
    attention = config.get("layer_types")
    if isinstance(attention, list) and "full_attention" in attention:
        interval = attention.index("full_attention") + 1
        full = [i for i, kind in enumerate(attention, start=1) if kind == "full_attention"]
        if full == list(range(interval, len(attention) + 1, interval)):
            config.setdefault("full_attention_interval", interval)
    feed_forward = config.get("mlp_layer_types")
    if isinstance(feed_forward, list) and set(feed_forward) <= {"dense", "sparse"}:
        dense = feed_forward.count("dense")
        if "sparse" not in feed_forward[:dense]:
            config.setdefault("first_k_dense_replace", dense)


def _transformers_class(config: Config) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]]
    except KeyError:
        return None


def _aliases(config: Config) -> dict[str, str]:
    """transformers' own table of names for the same attribute in this model type."""
    return dict(getattr(_transformers_class(config), "attribute_map", None) or {})


def _derive(config: Config, name: str) -> Any:
    """A key the family requires, by synonym, arithmetic or transformers' default; else None."""
    for group in SYNONYMS:
        if name in group:
            stated = {config[key] for key in group if config.get(key) is not None}
            if len(stated) == 1:
                return stated.pop()
    if name in ABSENT_PARTS:
        return 0
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if name == "head_dim" and heads and hidden:
        return hidden // heads
    if name == "num_key_value_heads" and heads:
        return heads
    rotated = config.get("partial_rotary_factor")
    if name == "rotary_dim" and rotated and config.get("head_dim"):
        return int(config["head_dim"] * rotated)
    cls = _transformers_class(config)
    if cls is None:
        return None
    # A copy, because config classes rewrite the nested tables they are given.
    known = copy.deepcopy({k: v for k, v in config.items() if k != "quantization"})
    try:
        return getattr(cls(**known), name, None)
    except Exception:  # a config class may reject what mlx-lm accepts
        return None
