"""How each part of a model is packed: presets, TOML files and plain options are all recipes.

A recipe is a list of rules, the general ones first; each states some values for a part of the
model, in all layers or in a range of them, and later rules win. Knows no modules and no arrays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flashmoe.base.errors import OptionError

BITS = (2, 3, 4, 5, 6, 8, 16, 32)
FLOAT_BITS = 16  # from here on, weights stay floats
GROUP_SIZES = (32, 64, 128)
METHODS = ("rtn", "hqq")
# Modes that are one format each, as bits and group size; affine ones are free.
FIXED_MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
MODES = ("affine", *FIXED_MODES)

# Every part, and the more general one whose rules it follows too.
PARTS = {
    "all": None,
    "experts": "all",
    "gate": "experts",
    "up": "experts",
    "down": "experts",
    "resident": "all",
    "attention": "resident",
    "embeddings": "resident",
    "head": "resident",
}
Values = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How one weight is packed; 16 bits round float32 to bfloat16, 32 keep what the source has.

    Raises OptionError for values that no format has.
    """

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"
    method: str = "rtn"

    def __post_init__(self) -> None:
        checked: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
            ("mode", self.mode, MODES),
            ("method", self.method, METHODS),
            ("bits", self.bits, BITS),
        )
        for name, value, allowed in checked:
            if value not in allowed or type(value) is not type(allowed[0]):
                raise OptionError(f"{name} must be one of {list(allowed)}, not {value!r}")
        if self.mode in FIXED_MODES:
            if (self.bits, self.group_size) != FIXED_MODES[self.mode]:
                bits, group_size = FIXED_MODES[self.mode]
                raise OptionError(
                    f"{self.mode} has {bits} bits in groups of {group_size}, not {self.bits} in "
                    f"groups of {self.group_size}; leave them out or say mode affine"
                )
            if self.method != "rtn":
                raise OptionError(f"method {self.method} is for mode affine, not {self.mode}")
        elif self.group_size not in GROUP_SIZES or type(self.group_size) is not int:
            raise OptionError(
                f"group size must be one of {list(GROUP_SIZES)}, not {self.group_size!r}"
            )

    @property
    def is_float(self) -> bool:
        return self.bits >= FLOAT_BITS

    def __str__(self) -> str:
        if self.is_float:
            return "floats" if self.bits == 32 else "16-bit floats"
        method = "" if self.method == "rtn" else f" {self.method}"
        return f"{self.bits}-bit {self.mode}/{self.group_size}{method}"


@dataclass(frozen=True)
class Rule:
    """Values of Setting for a part, in the layers from `first` to `last` (both included; None
    for every layer and what belongs to none)."""

    part: str
    values: tuple[tuple[str, Any], ...]
    first: int | None = None
    last: int | None = None

    def covers(self, part: str, layer: int | None) -> bool:
        if self.first is not None:
            if layer is None or layer < self.first:
                return False
            if self.last is not None and layer > self.last:
                return False
        above: str | None = part
        while above is not None and above != self.part:
            above = PARTS[above]
        return above is not None


@dataclass(frozen=True)
class Recipe:
    """Rules in the order that they are followed in.

    Raises OptionError when rules contradict each other in some part of some layer.
    """

    name: str
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        edges: set[int | None] = {None}
        for rule in self.rules:
            edges |= {rule.first, None if rule.last is None else rule.last + 1}
        for layer in edges:
            for part in PARTS:
                self.setting(part, layer)

    def setting(self, part: str, layer: int | None = None) -> Setting:
        """How `part` (a key of PARTS) of a layer, or of no layer, is packed."""
        values: Values = {}
        for rule in self.rules:
            if rule.covers(part, layer):
                values = _amended(values, dict(rule.values))
        try:
            return Setting(**values)
        except OptionError as error:
            where = part if layer is None else f"{part}, layer {layer}"
            raise OptionError(f"{self.name}, {where}: {error}") from None

    def with_method(self, method: str) -> Recipe:
        """The recipe with one method for everything that is affine.

        Raises OptionError for an unknown method.
        """
        Setting(method=method)
        rules = []
        for rule in (Rule("all", (("method", "rtn"),)), *self.rules):
            values = dict(rule.values)
            if values.get("mode", "affine") == "affine" and {"method", "mode"} & values.keys():
                values["method"] = method
            rules.append(replace(rule, values=tuple(values.items())))
        return Recipe(f"{self.name} {method}", tuple(rules))

    @property
    def key(self) -> str:
        """A short name of what the recipe asks for, equal for equal rules."""
        text = json.dumps([[r.part, r.first, r.last, dict(r.values)] for r in self.rules])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _amended(values: Values, later: Values) -> Values:
    """`later` on top of `values`; a mode that is one format brings its bits and group."""
    before, mode = (x.get("mode", "affine") for x in (values, {**values, **later}))
    if mode != before and mode in FIXED_MODES:
        bits, group_size = FIXED_MODES[mode]
        values = {"bits": bits, "group_size": group_size, "method": "rtn"}
    elif mode != before:
        values = {**values, "group_size": Setting.group_size}
    return {**values, **later}


def from_tables(name: str, document: Mapping[str, Any]) -> Recipe:
    """The recipe of a TOML document: keys for everything, a table for each part, and `layers`,
    an array of tables with `first`, `last` and tables for parts.

    Raises OptionError naming the key that is wrong.
    """
    values, tables, layers = _split(name, "the file", document, ("layers",))
    rules = _part_rules(name, values, tables, None, None)
    ranges = layers.get("layers", [])
    if not isinstance(ranges, list) or not all(isinstance(item, dict) for item in ranges):
        raise OptionError(f"{name}: layers must be tables, each under its own [[layers]]")
    for item in ranges:
        values, tables, bounds = _split(name, "[[layers]]", item, ("first", "last"))
        first, last = bounds.get("first", 0), bounds.get("last")
        for bound in (first, 0 if last is None else last):
            if type(bound) is not int or bound < 0:
                raise OptionError(f"{name}: first and last are layer numbers, not {bound!r}")
        if last is not None and last < first:
            raise OptionError(f"{name}: [[layers]] ends at {last}, before its first, {first}")
        rules += _part_rules(name, values, tables, first, last)
    return Recipe(name, tuple(rules))


KEYS = {"bits": "bits", "group": "group_size", "mode": "mode", "method": "method"}
_NESTED = {"experts": ("gate", "up", "down")}


def _split(
    name: str, where: str, table: Mapping[str, Any], extra: tuple[str, ...]
) -> tuple[Values, dict[str, Mapping[str, Any]], Values]:
    """A table's values, its tables by part, and what it has of `extra`."""
    values: Values = {}
    tables: dict[str, Mapping[str, Any]] = {}
    others: Values = {}
    parts = [part for part, above in PARTS.items() if above in ("all", "resident")]
    for key, value in table.items():
        if key in KEYS:
            values[KEYS[key]] = value
        elif key in extra:
            others[key] = value
        elif key in parts:
            if not isinstance(value, Mapping):
                raise OptionError(f"{name}: {key} is a table, not {value!r}")
            tables[key] = value
        else:
            known = ", ".join([*KEYS, *extra, *parts])
            raise OptionError(f"{name}: unknown key {key!r} in {where}; there are {known}")
    return values, tables, others


def _part_rules(
    name: str,
    values: Values,
    tables: Mapping[str, Mapping[str, Any]],
    first: int | None,
    last: int | None,
) -> list[Rule]:
    found: dict[str, Values] = {"all": values}
    for part, table in tables.items():
        nested = _NESTED.get(part, ())
        own: Values = {}
        for key, value in table.items():
            if key in KEYS:
                own[KEYS[key]] = value
            elif key in nested and isinstance(value, Mapping) and value.keys() <= KEYS.keys():
                found[key] = {KEYS[inner]: setting for inner, setting in value.items()}
            else:
                known = ", ".join([*KEYS, *(f"[{part}.{inner}]" for inner in nested)])
                raise OptionError(f"{name}: wrong key {key!r} in [{part}]; there are {known}")
        found[part] = own
    # General rules before the special ones, whatever their order in the file.
    return [
        Rule(part, tuple(found[part].items()), first, last) for part in PARTS if found.get(part)
    ]
