"""Recipes: what a file may say, which rule wins, and one sentence for each mistake."""

from pathlib import Path

import pytest

from flashmoe import OptionError
from flashmoe.repacking.presets import AS_IS, PRESETS, choose_recipe
from flashmoe.repacking.recipe import PARTS, Recipe, Rule, Setting, from_tables
from tests.support.refusals import refused

FILE = """
bits = 8
[experts]
bits = 3
group = 32
method = "hqq"
[experts.down]
bits = 4
[attention]
mode = "mxfp4"
[head]
bits = 16
[[layers]]
first = 2
last = 3
[layers.experts]
bits = 6
[[layers]]
first = 3
bits = 5
[layers.attention]
mode = "affine"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "mine.toml"
    path.write_text(FILE)
    return choose_recipe(path)


@pytest.mark.parametrize(
    ("part", "layer", "setting"),
    [
        ("gate", 0, Setting(3, 32, method="hqq")),
        ("up", 1, Setting(3, 32, method="hqq")),
        ("down", 0, Setting(4, 32, method="hqq")),
        ("attention", 0, Setting(4, 32, "mxfp4")),
        ("embeddings", None, Setting(8, 64)),
        ("head", None, Setting(16, 64)),
        ("resident", 1, Setting(8, 64)),
        # A range of layers comes after every part, and says it for all projections.
        ("gate", 2, Setting(6, 32, method="hqq")),
        ("down", 2, Setting(6, 32, method="hqq")),
        ("attention", 2, Setting(4, 32, "mxfp4")),
        ("resident", 3, Setting(5, 64)),
        ("gate", 100, Setting(5, 32, method="hqq")),
    ],
)
def test_later_and_special_rules_win(part, layer, setting):
    tables = {
        "bits": 8,
        "experts": {"bits": 3, "group": 32, "method": "hqq", "down": {"bits": 4}},
        "attention": {"mode": "mxfp4"},
        "head": {"bits": 16},
        "layers": [
            {"first": 2, "last": 3, "experts": {"bits": 6}},
            {"first": 3, "bits": 5, "attention": {"mode": "affine"}},
        ],
    }
    assert from_tables("mine", tables).setting(part, layer) == setting


def test_a_file_is_its_tables(recipe):
    assert recipe.setting("down", 2).bits == 6
    assert recipe.setting("attention", 2) == Setting(4, 32, "mxfp4")
    assert recipe.setting("attention", 3) == Setting(5, 64)
    assert recipe.setting("attention", None) == Setting(4, 32, "mxfp4")


def test_order_in_the_file_does_not_matter():
    special_first = {"experts": {"down": {"bits": 4}, "bits": 3}, "bits": 8}
    general_first = {"bits": 8, "experts": {"bits": 3, "down": {"bits": 4}}}
    assert from_tables("a", special_first).rules == from_tables("a", general_first).rules


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("4-bit", {"gate": 4, "down": 4, "attention": 4, "head": 4}),
        ("8-bit", {"gate": 8, "down": 8, "attention": 8, "head": 8}),
        ("3-bit", {"gate": 3, "up": 3, "down": 4, "attention": 8}),
        ("2-bit", {"gate": 2, "up": 2, "down": 2, "attention": 4, "embeddings": 4}),
        ("as-is", dict.fromkeys(PARTS, 32)),
    ],
)
def test_presets(name, bits):
    recipe = choose_recipe(name)
    assert {part: recipe.setting(part).bits for part in bits} == bits
    assert set(PRESETS) == {"4-bit", "8-bit", "3-bit", "2-bit", "as-is"}
    assert (recipe == AS_IS) == (name == "as-is")


def test_plain_options_are_a_recipe():
    assert choose_recipe().setting("gate", 0) == Setting(4, 64)
    recipe = choose_recipe(bits=2, group_size=32, resident_bits=8, method="hqq")
    assert recipe.setting("down", 7) == Setting(2, 32, method="hqq")
    assert recipe.setting("attention", 7) == Setting(8, 32, method="hqq")
    assert choose_recipe(bits=32).setting("head").is_float


def test_a_method_replaces_what_a_recipe_says(recipe):
    rounded = choose_recipe("2-bit", method="rtn")
    assert {rounded.setting(part).method for part in PARTS} == {"rtn"}
    fitted = recipe.with_method("hqq")
    assert fitted.setting("resident", 1).method == "hqq"
    assert fitted.setting("attention", 0) == Setting(4, 32, "mxfp4")
    assert fitted.setting("attention", 3) == Setting(5, 64, method="hqq")


def test_keys_tell_recipes_apart(recipe):
    others = [choose_recipe(name) for name in PRESETS]
    others += [recipe, recipe.with_method("rtn"), choose_recipe("2-bit", method="rtn")]
    assert len({other.key for other in others}) == len(others)
    assert Recipe("another name", recipe.rules).key == recipe.key
    assert choose_recipe(bits=3).key != choose_recipe(bits=3, resident_bits=8).key


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bit = 4", ("unknown key 'bit'", "bits")),
        ("bits = 7", ("bits must be one of", "7")),
        ("bits = 4.0", ("bits must be one of", "4.0")),
        ("bits = true", ("bits must be one of", "True")),
        ('bits = "4"', ("bits must be one of", "'4'")),
        ("group = 16", ("group size must be one of", "16")),
        ('mode = "nf4"', ("mode must be one of", "nf4")),
        ('method = "gptq"', ("method must be one of", "gptq")),
        ('mode = "mxfp4"\nbits = 3', ("mxfp4 has 4 bits in groups of 32", "3")),
        ('mode = "mxfp4"\nmethod = "hqq"', ("hqq is for mode affine",)),
        ('[attention]\nmode = "mxfp8"\n[[layers]]\nbits = 3', ("attention, layer 0", "mxfp8")),
        ("experts = 3", ("experts is a table", "3")),
        ("[experts.gait]\nbits = 3", ("'gait'", "[experts]", "[experts.gate]")),
        ("[experts.down]\nbit = 3", ("'down'", "[experts]")),
        ("[attention.down]\nbits = 3", ("'down'", "[attention]")),
        ("[layers]\nbits = 3", ("[[layers]]",)),
        ("[[layers]]\nfirst = -1", ("layer numbers", "-1")),
        ("[[layers]]\nlast = 1.5", ("layer numbers", "1.5")),
        ("[[layers]]\nfirst = 4\nlast = 3", ("ends at 3", "4")),
        ("[[layers]]\nfrom = 4", ("unknown key 'from'", "first")),
        ("bits = ", ("not valid TOML",)),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, text, words):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with refused(OptionError, "mine.toml", *words):
        choose_recipe(path)


def test_unknown_names_list_the_known_ones():
    with refused(OptionError, "5-bit", "3-bit", "as-is"):
        choose_recipe("5-bit")


@pytest.mark.parametrize("option", ["bits", "group_size", "resident_bits"])
def test_a_recipe_and_plain_options_contradict(option):
    with refused(OptionError, "a recipe states all bits"):
        choose_recipe("4-bit", **{option: 32})


def test_wrong_methods():
    with refused(OptionError, "method must be one of", "awq"):
        choose_recipe(method="awq")


def test_rules_cover_what_is_below_them():
    rule = Rule("resident", (("bits", 8),), first=1, last=2)
    covered = [(part, layer) for part in PARTS for layer in (None, 0, 1, 2, 3)]
    assert [pair for pair in covered if rule.covers(*pair)] == [
        (part, layer)
        for part in ("resident", "attention", "embeddings", "head")
        for layer in (1, 2)
    ]
