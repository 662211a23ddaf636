"""Recipes by name, from files, and from the plain options."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from flashmoe.base.errors import OptionError
from flashmoe.repacking.recipe import Recipe, Rule, Setting, Values, from_tables

# As they would stand in a file.
PRESETS: dict[str, dict[str, Any]] = {
    "as-is": {"bits": 32},
    "4-bit": {"bits": 4},
    "8-bit": {"bits": 8},
    "3-bit": {
        "bits": 8,
        "experts": {"bits": 3, "method": "hqq", "down": {"bits": 4}},
    },
    "2-bit": {
        "bits": 4,
        "method": "hqq",
        "experts": {"bits": 2, "group": 32},
    },
}
# The one recipe that quantized checkpoints take.
AS_IS = from_tables("as-is", PRESETS["as-is"])


def choose_recipe(
    recipe: str | Path | Recipe | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    resident_bits: int | None = None,
    method: str | None = None,
) -> Recipe:
    """What the options of a repack ask for, 4 bits in groups of 64 by default.

    `recipe` is a name of PRESETS or a TOML file; `bits`, `group_size` and `resident_bits` are a
    recipe themselves; `method` goes with either. Raises OptionError for both at once, an unknown
    name, and a value that is wrong.
    """
    if recipe is None:
        chosen = _plain(bits, group_size, resident_bits)
    elif not (bits is group_size is resident_bits is None):
        raise OptionError("a recipe states all bits and groups; leave out the options for them")
    else:
        chosen = recipe if isinstance(recipe, Recipe) else _named(recipe)
    return chosen if method is None else chosen.with_method(method)


def _plain(bits: int | None, group_size: int | None, resident_bits: int | None) -> Recipe:
    rules = []
    values: Values = {"bits": bits, "group_size": group_size}
    stated = tuple((name, value) for name, value in values.items() if value is not None)
    if stated:
        Setting(**dict(stated))
        rules.append(Rule("all", stated))
    if resident_bits is not None:
        try:
            Setting(bits=resident_bits)
        except OptionError as error:
            raise OptionError(f"resident {error}") from None
        rules.append(Rule("resident", (("bits", resident_bits),)))
    return Recipe("options", tuple(rules))


def _named(recipe: str | Path) -> Recipe:
    if str(recipe) in PRESETS:
        return from_tables(str(recipe), PRESETS[str(recipe)])
    path = Path(recipe).expanduser()
    if not path.is_file():
        raise OptionError(
            f"{recipe} is neither a file nor a recipe; the recipes are {', '.join(PRESETS)}"
        )
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{recipe} is not valid TOML: {error}") from None
    return from_tables(str(recipe), document)
