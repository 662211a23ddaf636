"""Predictors: for which families they are found, and what they prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchLinear

from flashmoe import FlashMoEModel
from flashmoe.checkpoint.architecture import expert_modules
from flashmoe.checkpoint.config import read_config
from flashmoe.kernels.linear import LEAST_WEIGHTS, NativeLinear
from flashmoe.model.load import use_native_linears
from flashmoe.model.predictor import Predictor, find_predictors, rescaling
from flashmoe.model.router_scoring import Groups
from flashmoe.model.routing_sites import find_sites
from flashmoe.streaming.experts import StreamedExperts
from tests.support.families import FAMILIES, build_model
from tests.support.natives import compiled
from tests.support.routing import WITHOUT, observe, recalls

# Families without predictors, and why.
# Four residual streams are mixed anew in every layer.
MIXED = {"deepseek_v41"}
WITH = [family for family in FAMILIES if family not in WITHOUT]
TOKENS = [5, 90, 41, 7, 63, 12, 100, 88]


def one_token_passes(model: nn.Module) -> None:
    for token in TOKENS:
        mx.eval(model(mx.array([[token]]), cache=make_prompt_cache(model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_found_and_nothing_changed(family: str) -> None:
    config = FAMILIES[family]
    model = build_model(config, seed=0)
    modules = {path: (id(m), type(m)) for path, m in model.named_modules()}
    before = model(mx.array([TOKENS]))
    mx.eval(before)
    parameters = {path: id(array) for path, array in flat(model)}
    predictors = find_predictors(model, config)
    assert len(predictors) == len(expert_modules(model))
    assert {path: (id(m), type(m)) for path, m in model.named_modules()} == modules
    assert {path: id(array) for path, array in flat(model)} == parameters
    assert bool(mx.array_equal(model(mx.array([TOKENS])), before))
    assert predictors[-1] is None
    assert [f is None for f in predictors[:-1]] == [family in WITHOUT] * (len(predictors) - 1)


def flat(model: nn.Module) -> list[tuple[str, mx.array]]:
    found: Any = tree_flatten(model.parameters())
    return list(found)


@pytest.mark.parametrize("family", [family for family in WITH if family not in MIXED])
def test_exact_where_layers_add_nothing(family: str) -> None:
    model = build_model(FAMILIES[family], seed=1)
    predictors = find_predictors(spread_norms(model), FAMILIES[family])
    silence(model, predictors)
    steps = observe(model, expert_modules(model))
    one_token_passes(model)
    assert all(len(seen) == len(TOKENS) for seen in steps)
    assert recalls(predictors, steps) == [1.0] * (len(steps) - 1)
    # The tokens route apart, so this is no constant predicted.
    assert len({tuple(sorted(after)) for _, after in steps[-1]}) > 2


def spread_norms(model: nn.Module) -> nn.Module:
    """Norm weights from -1.5 to 1.5, so that one layer's input says little of another's."""
    for module in model.modules():
        weight = module.get("weight")
        if not module.children() and isinstance(weight, mx.array) and weight.ndim == 1:
            module["weight"] = mx.random.uniform(-1.5, 1.5, weight.shape)
    return model


def silence(model: nn.Module, predictors: Sequence[Predictor | None]) -> None:
    """Let attention, experts and all else that is added to the residual stream be zero."""
    routers = {id(f.router) for f in predictors if f is not None}
    for path, module in model.named_modules():
        linear = isinstance(module, (nn.Linear, SwitchLinear)) and "lm_head" not in path
        if linear and id(module) not in routers:
            module.update({name: mx.zeros_like(array) for name, array in module.items()})


def test_random_models_are_predictioned_better_than_by_chance() -> None:
    found = []
    for family in WITH:
        model = build_model(FAMILIES[family], seed=0)
        predictors = find_predictors(model, FAMILIES[family])
        steps = observe(model, expert_modules(model))
        one_token_passes(model)
        found += [np.array(recalls(predictors, steps, times)) for times in (1, 2)]
    once, twice = np.concatenate(found[::2]).mean(), np.concatenate(found[1::2]).mean()
    print(f"recall over {len(WITH)} random families: {once:.2f} at k, {twice:.2f} at 2k")
    assert once > 2 / 8 + 0.1
    assert twice > 4 / 8 + 0.1


def test_recall_on_the_demo(demo: FlashMoEModel) -> None:
    predictors = find_predictors(demo.model, read_config(demo.store.path))
    layers = {p: m for p, m in demo.model.named_modules() if isinstance(m, StreamedExperts)}
    paths = [layer.layout.path for layer in demo.store.manifest.layers]
    steps = observe(demo.model, {path: layers[path] for path in paths})
    for prompt in ("What is a barn?", "Define river.", "What is a violin?"):
        list(demo.session().stream(prompt, max_new_tokens=16))
    assert len(predictors) == 6
    # Chance is 1/16 and 1/8.
    assert np.mean(recalls(predictors, steps)) > 0.6
    assert np.mean(recalls(predictors, steps, 2)) > 0.75
    assert min(recalls(predictors, steps)) > 0.4


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma4_text"])
def test_one_layer_has_no_next(family: str) -> None:
    only = {"num_hidden_layers": 1, "mlp_only_layers": [], "layer_types": ["full_attention"]}
    config = {**FAMILIES[family], **only}
    assert find_predictors(build_model(config, seed=0), config) == (None,)


def test_quantized_router_and_bfloat16() -> None:
    model = build_model(FAMILIES["mixtral"], seed=0)
    nn.quantize(model, class_predicate=lambda path, _: path.endswith(".gate"))
    model.set_dtype(mx.bfloat16)
    predictor = find_predictors(model, FAMILIES["mixtral"])[0]
    assert predictor is not None
    assert isinstance(predictor.router, nn.QuantizedLinear)
    x = mx.random.normal((1, 1, 64)).astype(mx.bfloat16)
    predicted = predictor(x)
    assert (predicted.dtype, predicted.shape) == (mx.int32, (2,))
    rescaled = (x[0].astype(mx.float32) * predictor.scale).astype(mx.bfloat16)
    logits = predictor.router(rescaled)[0].astype(mx.float32)
    assert predicted.tolist() == mx.argsort(-logits)[:2].tolist()
    assert predictor(x, 4).tolist()[:2] == predicted.tolist()


def test_groups_are_found() -> None:
    wide = {"n_routed_experts": 32, "n_group": 8, "topk_group": 3, "num_experts_per_tok": 4}
    sites = find_sites({**FAMILIES["deepseek_v3"], **wide}).values()
    for site in sites:
        assert site is not None
        assert site.scoring.groups == Groups(count=8, kept=3, best=2)
        assert site.bias is not None
        assert (site.top_k, site.n_experts) == (4, 32)


@compiled
def test_native_router_predictions_the_same() -> None:
    config = {**FAMILIES["qwen3_moe"], "hidden_size": 512, "num_experts": LEAST_WEIGHTS // 512}
    model = build_model(config, seed=0)
    x = mx.random.normal((1, 1, 512))
    stock = find_predictors(model, config)[0]
    use_native_linears(model)
    native = find_predictors(model, config)[0]
    assert stock is not None
    assert native is not None
    assert isinstance(native.router, NativeLinear)
    assert native(x, 16).tolist() == stock(x, 16).tolist()


# Rescaling


def norm_with(kind: type[nn.Module], seed: int) -> nn.Module:
    norm = kind(16)
    mx.random.seed(seed)
    norm.update({name: mx.random.normal((16,)) for name in norm.parameters()})
    return norm


class OnePlusNorm(nn.RMSNorm):
    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, 1 + self.weight, self.eps)


@pytest.mark.parametrize("here", [nn.RMSNorm, OnePlusNorm])
@pytest.mark.parametrize("after", [nn.RMSNorm, OnePlusNorm])
def test_rescaling_of_rms_norms(here: type[nn.Module], after: type[nn.Module]) -> None:
    assert_rescales(norm_with(here, 1), norm_with(after, 2))


def test_rescaling_of_layer_norms_moves_their_bias() -> None:
    assert_rescales(norm_with(nn.LayerNorm, 1), norm_with(nn.LayerNorm, 2))


def assert_rescales(here: nn.Module, after: nn.Module) -> None:
    rescaled = rescaling(here, after)
    assert rescaled is not None
    scale, shift = rescaled
    h = mx.random.normal((5, 16)) * 7
    ours = np.array(here(h)) * scale + shift
    np.testing.assert_allclose(ours, np.array(after(h)), rtol=1e-3, atol=1e-3)


def test_rescaling_over_zero_weights_gives_zeros() -> None:
    here, after = norm_with(nn.RMSNorm, 1), norm_with(nn.RMSNorm, 2)
    here.weight[3] = 0
    rescaled = rescaling(here, after)
    assert rescaled is not None
    assert rescaled[0][3] == 0
    assert np.isfinite(rescaled[0]).all()
    assert np.count_nonzero(rescaled[0]) == 15


def test_no_rescaling_between_different_norms() -> None:
    assert rescaling(norm_with(nn.RMSNorm, 1), norm_with(nn.LayerNorm, 2)) is None
    assert rescaling(norm_with(nn.RMSNorm, 1), nn.RMSNorm(8)) is None
    assert rescaling(nn.Linear(16, 16), norm_with(nn.RMSNorm, 2)) is None
