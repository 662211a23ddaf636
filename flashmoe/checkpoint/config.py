"""A checkpoint's config.json, brought to the keys that its mlx-lm family expects.

transformers 5 writes rope settings under `rope_parameters` and renames or omits keys that
mlx-lm's model arguments require. Normalising only ever adds keys: arguments that a family does
not know are ignored by mlx-lm, and a key that is already there is never changed, but for one
null that means something else to mlx-lm.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashmoe.base.errors import SourceError
from flashmoe.checkpoint.rope import state_as_table, state_flat, state_yarn_scale

Config = dict[str, Any]

# Keys under which checkpoints state one and the same number.
SYNONYMS = (
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"),
    ("rms_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps", "layer_norm_eps"),
)

# Widths of parts that a model may do without; a config that leaves one out has no such part.
ABSENT_PARTS = ("shared_intermediate_size",)

# What transformers' code does without a key for it, by the names that mlx-lm requires. Such a key
# is filled in only where neither the config nor transformers' own config class has it.
TAKEN_FOR_GRANTED = {
    "attention_method": "MLA",
    "first_k_dense_replace": 0,
    "intermediate_size": 0,
    "mla_scale_kv_lora": True,
    "mla_scale_q_lora": True,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "partial_rotary_factor": 1.0,
    "rope_theta": 10_000.0,  # of a model that rotates nothing
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "zero_expert_type": "identity",
}

# What transformers 5 renamed in lists of layers, by the names it had before.
OLDER_LAYER_TYPES = {"full_attention": "attention", "linear_attention": "mamba"}


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
    """A copy of `config` with rope keys old and new and every alias that transformers defines.

    Applied to the top level and to each nested text config.
    """
    levels = {
        key: normalize(value)
        for key, value in config.items()
        if isinstance(value, dict) and key.endswith("_config") and "hidden_size" in value
    }
    config = {**config, **levels}
    if "vocab_size" in levels.get("text_config", {}):
        config.setdefault("vocab_size", levels["text_config"]["vocab_size"])
    if "rope_parameters" not in config and config.get("rope_theta") is not None:
        state_as_table(config, getattr(_transformers_config(config), "rope_parameters", None))
    state_yarn_scale(config)
    state_flat(config)
    _add_layer_pattern(config)
    _add_layer_overrides(config)
    if "position_embedding_type" in config:  # null means none to transformers, rotary to mlx-lm
        config["position_embedding_type"] = config["position_embedding_type"] or "nope"
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


def with_older_layer_types(config: Config) -> Config | None:
    """A copy of `config` whose `layer_types` have the names from before transformers 5.13, or
    None when it states none of them.

    For a family that has refused the config as it is: the one case in which a value is changed.
    """
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or not set(kinds) & set(OLDER_LAYER_TYPES):
        return None
    return {**config, "layer_types": [OLDER_LAYER_TYPES.get(kind, kind) for kind in kinds]}


def missing_arguments(error: Exception) -> list[str]:
    """The argument names in Python's own message about missing arguments, or nothing."""
    text = str(error) if isinstance(error, TypeError) else ""
    return re.findall(r"'(\w+)'", text) if "missing" in text and "argument" in text else []


def _levels(config: Config) -> Iterator[Config]:
    """The config itself and its nested text configs, the latter copied so they may be changed."""
    yield config
    for key, value in list(config.items()):
        if isinstance(value, dict) and key.endswith("_config") and "hidden_size" in value:
            config[key] = dict(value)
            yield config[key]


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


def _add_layer_overrides(config: Config) -> None:
    """State what `per_layer_config` says of the full-attention layers as mlx-lm's numbers do."""
    overrides, kinds = config.get("per_layer_config"), config.get("layer_types")
    if not isinstance(overrides, dict) or not isinstance(kinds, list):
        return
    # Some numbers have leading zeros.
    by_layer = {int(layer): own for layer, own in overrides.items() if layer.isdigit()}
    full = [by_layer.get(i, {}) for i, kind in enumerate(kinds) if kind == "full_attention"]
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    for key, name in names.items():
        values = {own.get(key, config.get(key)) for own in full}
        if len(values) == 1 and None not in values:
            config.setdefault(name, values.pop())


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
    if name == "rotary_dim" and config.get("head_dim"):
        rotated = config.get("partial_rotary_factor") or _derive(config, "partial_rotary_factor")
        return int(config["head_dim"] * rotated) if rotated else None
    if name == "is_moe_layer" and config.get("mlp_layer_types"):
        return [kind == "sparse" for kind in config["mlp_layer_types"]]
    if name == "linear_attn_config":
        return _linear_attention(config)
    return _transformers_default(config, name)


def _linear_attention(config: Config) -> Config | None:
    """The table of a hybrid's linear attention, out of the flat keys of transformers 5."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or not {"linear_num_heads", "linear_head_dim"} <= set(config):
        return None
    layers = list(enumerate(kinds, start=1))
    return {
        "num_heads": config["linear_num_heads"],
        "head_dim": config["linear_head_dim"],
        "short_conv_kernel_size": config.get("linear_conv_kernel_dim", 4),
        "kda_layers": [i for i, kind in layers if kind == "linear_attention"],
        "full_attn_layers": [i for i, kind in layers if kind == "full_attention"],
    }


def _transformers_default(config: Config, name: str) -> Any:
    """The value that transformers would use for a key the config lacks, or None."""
    known = _transformers_config(config)
    if known is None:
        return None
    rope = getattr(known, "rope_parameters", None) or {}
    for value in (getattr(known, name, None), rope.get(name)):
        if value is not None:
            return value
    return TAKEN_FOR_GRANTED.get(name)


def _transformers_config(config: Config) -> Any:
    """transformers' own object for this config, its defaults filled in; None without one."""
    cls = _transformers_class(config)
    if cls is None:
        return None
    # A copy, because config classes rewrite the nested tables they are given.
    known = copy.deepcopy({k: v for k, v in config.items() if k != "quantization"})
    try:
        return cls(**known)
    except Exception:  # a config class may reject what mlx-lm accepts
        return None


def largest(config: Config, key: str) -> int:
    """The largest value of a whole-number key over the config and its nested configs."""
    levels = [config, *(value for value in config.values() if isinstance(value, dict))]
    values = [level.get(key) for level in levels]
    return max((value for value in values if isinstance(value, int)), default=0)
