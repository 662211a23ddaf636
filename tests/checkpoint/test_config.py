import copy
import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flashmoe.base.errors import SourceError
from flashmoe.checkpoint.config import (
    fill_missing,
    normalize,
    read_config,
    with_older_layer_types,
)

# "none" is no model type, so that transformers adds nothing.
BASE = {"model_type": "none", "hidden_size": 64, "num_attention_heads": 4}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "original_max_position_embeddings": 4096,
}


def added(config):
    """The keys that normalising adds; those that were there must be as they were."""
    before = copy.deepcopy(config)
    result = normalize(config)
    assert config == before
    assert {key: result[key] for key in config if not key.endswith("_config")} == {
        key: value for key, value in before.items() if not key.endswith("_config")
    }
    return {key: value for key, value in result.items() if key not in before}


def pattern(text):
    names = {"f": "full_attention", "l": "linear_attention", "s": "sliding_attention"}
    return [names[letter] for letter in text]


class TestRope:
    def test_no_rope_parameters(self):
        assert added(BASE) == {}
        assert added(BASE | {"rope_theta": 5e6, "rope_scaling": None}) == {}
        assert added(BASE | {"rope_parameters": None}) == {}

    def test_default(self):
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        assert added(BASE | {"rope_parameters": rope}) == {
            "rope_theta": 10_000.0,
            "rope_scaling": None,
        }

    def test_no_type_is_default(self):
        assert added(BASE | {"rope_parameters": {"rope_theta": 5e6}}) == {
            "rope_theta": 5e6,
            "rope_scaling": None,
        }

    def test_partial_rotation(self):
        rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
        assert added(BASE | {"rope_parameters": rope}) == {
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "rope_scaling": None,
        }

    @pytest.mark.parametrize("key", ["rope_type", "type"])
    def test_yarn(self, key):
        rope = {**YARN, key: "yarn"}
        if key == "type":
            del rope["rope_type"]
        assert added(BASE | {"rope_parameters": rope}) == {
            "rope_theta": 150_000.0,
            "rope_scaling": {
                "type": "yarn",
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "original_max_position_embeddings": 4096,
            },
        }

    def test_a_table_per_layer_type(self):
        rope = {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
        assert added(BASE | {"rope_parameters": rope}) == {}
        rope["sliding_attention"]["rope_theta"] = 1e6
        assert added(BASE | {"rope_parameters": rope}) == {"rope_theta": 1e6}
        del rope["sliding_attention"]["rope_theta"]
        assert added(BASE | {"rope_parameters": rope}) == {}

    def test_older_keys_stay(self):
        config = BASE | {"rope_parameters": YARN, "rope_theta": 1.0, "rope_scaling": None}
        assert added(config) == {}

    def test_older_keys_alone(self):
        config = {"model_type": "qwen3_next", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
        rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
        assert added(config)["rope_parameters"] == rope
        config |= {"rope_scaling": {"type": "yarn", "factor": 4.0}}
        assert added(config)["rope_parameters"] == rope | {
            "rope_type": "yarn",
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32_768,
        }

    def test_an_attention_factor_of_yarn(self):
        tables = {
            "full_attention": {"rope_type": "yarn", "factor": math.e, "attention_factor": 1.2},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
        result = normalize(BASE | {"rope_parameters": tables})["rope_parameters"]
        assert result["full_attention"]["mscale"] == pytest.approx(2.0)
        assert result["sliding_attention"] == tables["sliding_attention"]
        flat = normalize(BASE | {"rope_scaling": tables["full_attention"]})["rope_scaling"]
        assert flat == result["full_attention"]

    @pytest.mark.parametrize("own", [{}, {"factor": 1.0}, {"mscale": 0.5}, {"rope_type": "linear"}])
    def test_no_scale_to_state(self, own):
        rope = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.2 if own else None} | own
        assert normalize(BASE | {"rope_parameters": rope})["rope_parameters"] == rope


class TestLayerPattern:
    @pytest.mark.parametrize(
        ("text", "interval"),
        [
            ("lllf" * 3, 4),
            ("lllf" * 2 + "ll", 4),
            ("sf", 2),
            ("ffff", 1),
            ("lllfl", 4),
            ("llf", 3),
        ],
    )
    def test_regular(self, text, interval):
        config = BASE | {"layer_types": pattern(text)}
        assert added(config) == {"full_attention_interval": interval}

    @pytest.mark.parametrize("text", ["", "llll", "fsfs", "lfllf", "lllff", "lffl"])
    def test_irregular(self, text):
        assert added(BASE | {"layer_types": pattern(text)}) == {}

    @pytest.mark.parametrize(
        ("text", "dense"), [("dss", 1), ("ddds", 3), ("sss", 0), ("ddd", 3), ("", 0)]
    )
    def test_dense_layers_first(self, text, dense):
        kinds = [{"d": "dense", "s": "sparse"}[letter] for letter in text]
        assert added(BASE | {"mlp_layer_types": kinds}) == {"first_k_dense_replace": dense}

    @pytest.mark.parametrize("kinds", [["sparse", "dense"], ["dense", "moe"], "dense", None])
    def test_other_orders_say_nothing(self, kinds):
        assert added(BASE | {"mlp_layer_types": kinds}) == {}

    def test_stated_numbers_stay(self):
        config = BASE | {"layer_types": pattern("lllf"), "full_attention_interval": 9}
        config |= {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": 7}
        assert added(config) == {}


class TestLayerOverrides:
    KINDS = pattern("sf" * 5 + "f")

    def test_full_attention_layers(self):
        own = {"head_dim": 32, "num_key_value_heads": 1}
        layers = dict.fromkeys(("01", "3", "05", "07", "09", "10"), own)
        config = BASE | {"layer_types": self.KINDS, "per_layer_config": layers, "head_dim": 16}
        assert added(config) == {"global_head_dim": 32, "num_global_key_value_heads": 1}

    def test_without_any(self):
        config = BASE | {"layer_types": self.KINDS, "per_layer_config": {}, "head_dim": 16}
        assert added(config) == {"global_head_dim": 16}

    @pytest.mark.parametrize("layers", [None, {"1": {"head_dim": 32}}, {"one": {"head_dim": 32}}])
    def test_layers_that_differ_say_nothing(self, layers):
        config = BASE | {"layer_types": self.KINDS, "per_layer_config": layers}
        assert added(config) == {}


class TestOlderLayerTypes:
    def test_renamed(self):
        config = BASE | {"layer_types": [*pattern("lf"), "conv"]}
        assert with_older_layer_types(config) == BASE | {
            "layer_types": ["mamba", "attention", "conv"]
        }
        assert config["layer_types"] == [*pattern("lf"), "conv"]

    @pytest.mark.parametrize("kinds", [None, [], ["mamba", "attention"], pattern("s")])
    def test_nothing_to_rename(self, kinds):
        assert with_older_layer_types(BASE | {"layer_types": kinds}) is None


class TestAliases:
    @pytest.mark.parametrize(
        ("model_type", "have", "lack"),
        [
            ("mixtral", "num_local_experts", "num_experts"),
            ("mixtral", "num_experts", "num_local_experts"),
            ("qwen3_moe", "num_local_experts", "num_experts"),
            ("deepseek_v3", "n_routed_experts", "num_local_experts"),
            ("dbrx", "d_model", "hidden_size"),
        ],
    )
    def test_both_ways(self, model_type, have, lack):
        assert added({"model_type": model_type, have: 8}) == {lack: 8}

    def test_both_stated(self):
        config = {"model_type": "mixtral", "num_experts": 8, "num_local_experts": 4}
        assert added(config) == {}

    def test_an_unknown_model_type_has_none(self):
        assert added({"model_type": "none", "num_local_experts": 8}) == {}
        assert added({"num_local_experts": 8}) == {}


class TestLevels:
    def test_a_nested_text_config(self):
        text = {"model_type": "mixtral", "hidden_size": 64, "num_local_experts": 8}
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
        config = {"model_type": "wrapper", "text_config": text, "vision_config": {"depth": 3}}
        before = copy.deepcopy(config)
        result = normalize(config)
        assert config == before
        assert result["text_config"] == text | {
            "num_experts": 8,
            "rope_theta": 1e4,
            "rope_scaling": None,
        }
        assert result["vision_config"] == {"depth": 3}
        assert set(result) == set(config)

    def test_the_vocabulary_of_a_nested_text_config(self):
        text = BASE | {"vocab_size": 128}
        assert added({"model_type": "none", "text_config": text}) == {"vocab_size": 128}
        assert added({"model_type": "none", "text_config": text, "vocab_size": 64}) == {}

    @pytest.mark.parametrize(("stated", "result"), [(None, "nope"), ("rope", "rope")])
    def test_positions_without_an_embedding(self, stated, result):
        config = BASE | {"position_embedding_type": stated}
        assert normalize(config) == BASE | {"position_embedding_type": result}


values = st.none() | st.booleans() | st.integers(1, 64) | st.floats(0.1, 1e6) | st.text(max_size=3)
rope = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "yarn", "linear"]),
        "type": st.just("yarn"),
        "rope_theta": st.none() | st.floats(1, 1e7),
        "factor": st.floats(1, 32),
        "partial_rotary_factor": st.none() | st.sampled_from([0.25, 0.5]),
    },
)
level = st.fixed_dictionaries(
    {"model_type": st.sampled_from(["mixtral", "qwen3_moe", "deepseek_v3", "none"])},
    optional={
        "hidden_size": st.integers(1, 4096),
        "num_attention_heads": st.integers(1, 64),
        "num_experts": st.integers(1, 512),
        "num_local_experts": st.integers(1, 512),
        "n_routed_experts": st.integers(1, 512),
        "rope_theta": values,
        "rope_scaling": values,
        "rope_parameters": st.none()
        | rope
        | st.dictionaries(st.sampled_from(["full_attention", "sliding_attention"]), rope),
        "layer_types": st.none() | st.text("fls", max_size=9).map(pattern),
        "mlp_layer_types": st.lists(st.sampled_from(["dense", "sparse"]), max_size=6),
        "full_attention_interval": values,
        "head_dim": values,
        "whatever": values,
    },
)
config = st.tuples(level, st.none() | level).map(
    lambda drawn: drawn[0] | ({} if drawn[1] is None else {"text_config": drawn[1]})
)


def assert_kept(before, after):
    """Every key of `before` is in `after` with the same value, nested configs likewise."""
    for key, value in before.items():
        if key.endswith("_config"):
            assert_kept(value, after[key])
        else:
            assert after[key] == value
            assert type(after[key]) is type(value)


@given(config)
@settings(max_examples=150)
@example({"model_type": "none", "rope_theta": None, "rope_parameters": {"rope_theta": 1.0}})
def test_existing_keys_are_never_changed(config):
    before = copy.deepcopy(config)
    result = normalize(config)
    assert config == before
    assert_kept(before, result)
    again = normalize(result)
    assert again == result


@given(config, st.sampled_from(["head_dim", "num_key_value_heads", "num_experts", "moe_k"]))
@settings(max_examples=60)
def test_filling_never_changes_a_key(config, name):
    before = copy.deepcopy(config)
    try:
        result = fill_missing(config, [name])
    except SourceError as error:
        assert f"lacks {name!r}" in str(error)
    else:
        assert_kept(before, result)
        assert name in result or name in result["text_config"]
    assert config == before


class TestReadConfig:
    def test_eos_ids_of_the_generation_config(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "x", "eos_token_id": 1}')
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
        assert read_config(tmp_path) == {"model_type": "x", "eos_token_id": [1, 2]}

    def test_missing(self, tmp_path):
        with pytest.raises(SourceError, match=r"has no config\.json"):
            read_config(tmp_path)

    @pytest.mark.parametrize("text", ["", "{", "[" * 50_000, '{"a": "\ud800"}', "9" * 5000])
    def test_not_json(self, tmp_path, text):
        (tmp_path / "config.json").write_bytes(text.encode(errors="surrogatepass"))
        with pytest.raises(SourceError, match=r"config\.json cannot be read"):
            read_config(tmp_path)

    @pytest.mark.parametrize("document", [{}, {"model_type": None}, {"model_type": 5}, [], None, 5])
    def test_no_model_type(self, tmp_path, document):
        (tmp_path / "config.json").write_text(json.dumps(document))
        with pytest.raises(SourceError, match=r"config\.json names no model_type"):
            read_config(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[]", "null"])
    def test_a_generation_config_that_is_none(self, tmp_path, text):
        """Passed over or refused, but never an error of another kind."""
        (tmp_path / "config.json").write_text('{"model_type": "x", "eos_token_id": 1}')
        (tmp_path / "generation_config.json").write_text(text)
        try:
            found = read_config(tmp_path)
        except SourceError as error:
            assert str(tmp_path) in str(error)
        else:
            assert found == {"model_type": "x", "eos_token_id": 1}
