"""Keys that a family requires and a config lacks."""

import copy

import pytest

from flashmoe.base.errors import SourceError
from flashmoe.checkpoint.config import fill_missing, missing_arguments

# "none" is no model type, so that transformers adds nothing.
BASE = {"model_type": "none", "hidden_size": 64, "num_attention_heads": 4}


class TestFillMissing:
    @pytest.mark.parametrize(
        ("stated", "name"),
        [
            ("num_local_experts", "num_experts"),
            ("n_routed_experts", "num_local_experts"),
            ("moe_num_experts", "n_routed_experts"),
            ("num_experts_per_token", "num_experts_per_tok"),
            ("moe_topk", "num_experts_per_tok"),
            ("moe_k", "top_k_experts"),
            ("layer_norm_epsilon", "rms_norm_eps"),
            ("norm_eps", "layer_norm_eps"),
        ],
    )
    def test_synonyms(self, stated, name):
        assert fill_missing(BASE | {stated: 5}, [name]) == BASE | {stated: 5, name: 5}

    def test_synonyms_that_agree(self):
        config = BASE | {"num_local_experts": 8, "moe_num_experts": 8, "n_routed_experts": None}
        assert fill_missing(config, ["num_experts"])["num_experts"] == 8

    def test_synonyms_that_contradict(self):
        config = BASE | {"num_local_experts": 8, "moe_num_experts": 16}
        with pytest.raises(SourceError, match="lacks 'num_experts'"):
            fill_missing(config, ["num_experts"])

    def test_arithmetic(self):
        assert fill_missing(BASE, ["head_dim"])["head_dim"] == 16
        assert fill_missing(BASE, ["num_key_value_heads"])["num_key_value_heads"] == 4
        config = BASE | {"head_dim": 128, "partial_rotary_factor": 0.25}
        assert fill_missing(config, ["rotary_dim"])["rotary_dim"] == 32
        assert fill_missing(BASE, ["shared_intermediate_size"])["shared_intermediate_size"] == 0

    def test_lists_of_layers(self):
        config = BASE | {"mlp_layer_types": ["sparse", "dense", "sparse"]}
        assert fill_missing(config, ["is_moe_layer"])["is_moe_layer"] == [True, False, True]
        config = BASE | {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_heads": 2,
        }
        config |= {"linear_head_dim": 16, "linear_conv_kernel_dim": 3}
        assert fill_missing(config, ["linear_attn_config"])["linear_attn_config"] == {
            "num_heads": 2,
            "head_dim": 16,
            "short_conv_kernel_size": 3,
            "kda_layers": [1, 3],
            "full_attn_layers": [2],
        }

    def test_what_transformers_takes_for_granted(self):
        config = {"model_type": "minimax_m2", "head_dim": 16}
        assert fill_missing(config, ["scoring_func"])["scoring_func"] == "sigmoid"
        assert fill_missing(config, ["rotary_dim"])["rotary_dim"] == 16
        # Its own default goes first.
        config = {"model_type": "glm4_moe", "head_dim": 16}
        assert fill_missing(config, ["rotary_dim"])["rotary_dim"] == 8
        for name in ("scoring_func", "rotary_dim", "linear_attn_config"):
            with pytest.raises(SourceError, match=f"lacks '{name}'"):
                fill_missing(BASE | {"head_dim": 16}, [name])

    def test_one_derived_from_another(self):
        config = BASE | {"partial_rotary_factor": 0.5}
        filled = fill_missing(config, ["head_dim", "rotary_dim"])
        assert (filled["head_dim"], filled["rotary_dim"]) == (16, 8)

    def test_transformers_defaults(self):
        config = {"model_type": "mixtral", "hidden_size": 64, "num_attention_heads": 4}
        assert fill_missing(config, ["num_local_experts"])["num_local_experts"] == 8
        assert fill_missing(config, ["vocab_size"])["vocab_size"] == 32_000

    @pytest.mark.parametrize("model_type", ["none", "mixtral"])
    def test_an_underivable_key(self, model_type):
        with pytest.raises(SourceError) as caught:
            fill_missing(BASE | {"model_type": model_type}, ["head_dim", "warp_factor"])
        assert str(caught.value).startswith(
            f"config.json lacks 'warp_factor', which {model_type} needs"
        )

    def test_no_heads_no_head_dim(self):
        with pytest.raises(SourceError, match="lacks 'head_dim'"):
            fill_missing({"model_type": "none", "hidden_size": 64}, ["head_dim"])

    def test_nested_levels(self):
        text = {"model_type": "none", "hidden_size": 64, "num_attention_heads": 2}
        config = {"model_type": "none", "text_config": text, "other": {"hidden_size": 1}}
        before = copy.deepcopy(config)
        filled = fill_missing(config, ["head_dim"])
        assert config == before
        assert filled == {**config, "text_config": text | {"head_dim": 32}}


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: (lambda a, b: 0)(), ["a", "b"]),
        (lambda: (lambda *, first_key: 0)(), ["first_key"]),
        (lambda: (lambda a: 0)(1, 2), []),
        (lambda: len(5), []),
    ],
)
def test_missing_arguments(call, names):
    with pytest.raises(TypeError) as caught:
        call()
    assert missing_arguments(caught.value) == names
