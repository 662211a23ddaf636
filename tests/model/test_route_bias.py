"""Routing that prefers experts in memory: what is chosen, and that weights stay the family's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flashmoe.base.errors import OptionError
from flashmoe.checkpoint.architecture import expert_modules, replace_modules
from flashmoe.checkpoint.top_k import _with_top_k
from flashmoe.model.route_bias import Steering, find_steerable, prefer_resident
from flashmoe.model.router_scoring import Groups, Scoring
from flashmoe.model.routing_sites import find_sites
from tests.support.families import FAMILIES, build_model
from tests.support.routing import WITHOUT

WITH = [family for family in FAMILIES if family not in WITHOUT]
# One expert per token cannot be compared with another one's weight.
N_EXPERTS = 8


class OneHot(nn.Module):
    """In the experts' place: expert e gives e's unit vector, times how far its input was scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.x: Any = None
        self.on = True

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        assert indices.size == indices.shape[-1]
        self.indices = np.array(indices).reshape(-1)
        scale = (x * self.x.reshape(x.shape)).sum() / (self.x * self.x).sum()
        units = mx.eye(x.shape[-1])[indices]
        return units * scale if self.on else mx.zeros_like(units)


class Block:
    """One MoE block of a family, its router drawn apart."""

    def __init__(self, family: str, config: dict[str, Any]) -> None:
        self.model = build_model(config, seed=0)
        self.sites = find_sites(config)
        (self.path, site), *_ = self.sites.items()
        assert site is not None
        self.site = site
        self.experts = OneHot()
        block = self.path.rpartition(".")[0]
        while not site.router.startswith(f"{block}."):
            block = block.rpartition(".")[0]
        self.block = block
        replace_modules(self.model, dict.fromkeys(expert_modules(self.model), self.experts))

    def weights(self, x: mx.array) -> np.ndarray:
        """What each expert's output is multiplied with [n_experts]."""
        module = dict(self.model.named_modules())[self.block]
        outputs = []
        for on in (True, False):
            self.experts.x, self.experts.on = x, on
            out = module(x)
            out = out[0] if isinstance(out, tuple) else out
            outputs.append(np.array(out.astype(mx.float32)).reshape(-1))
        return (outputs[0] - outputs[1])[:N_EXPERTS]


class Bank:
    def __init__(self, resident: np.ndarray) -> None:
        self.resident = resident

    def residency(self) -> np.ndarray:
        return self.resident


def steer(block: Block, config: dict[str, Any], margin: float) -> list[Bank]:
    banks = [Bank(np.ones(N_EXPERTS, bool)) for _ in block.sites]
    streaming: Any = SimpleNamespace(module=block.model, banks=banks)
    prefer_resident(streaming, find_steerable(config), margin)
    return banks


@pytest.mark.parametrize("family", WITH)
def test_the_chosen_are_weighted_as_the_family_would(family: str) -> None:
    config = FAMILIES[family]
    plain, steered = Block(family, config), Block(family, config)
    banks = steer(steered, config, margin=2.0)
    grouped = plain.site.scoring.groups is not None
    single = plain.site.top_k == 1
    most = 1 if single else N_EXPERTS // 2 if grouped else N_EXPERTS
    everything = Block(family, _with_top_k(config, most))
    random = np.random.default_rng(1)
    swapped = 0
    for _ in range(40):
        x = mx.array(random.standard_normal((1, 1, 64)).astype(np.float32))
        natural = plain.weights(x)
        first = set(plain.experts.indices.tolist())
        banks[0].resident = random.random(N_EXPERTS) < 0.6
        resident = set(np.flatnonzero(banks[0].resident).tolist())
        found = steered.weights(x)
        chosen = set(steered.experts.indices.tolist())
        assert chosen - first <= resident
        assert first & resident <= chosen
        if chosen == first:
            np.testing.assert_array_equal(found, natural)
            continue
        swapped += 1
        if single:
            # The one family of which there is no larger top-k: its weight is a sigmoid.
            router = dict(plain.model.named_modules())[plain.site.router]
            full = 1 / (1 + np.exp(-np.array(router(x)).reshape(-1)))
        else:
            full = everything.weights(x)
        kept = sorted(chosen)
        if np.allclose(full[sorted(first)], natural[sorted(first)], rtol=1e-4, atol=1e-6):
            expected = full[kept]
        else:
            expected = full[kept] * natural.sum() / full[kept].sum()
        np.testing.assert_allclose(found[kept], expected, rtol=2e-3, atol=1e-5)
    assert swapped >= 5


class TestSteering:
    LOGITS = np.array([3.0, 2.0, 1.5, 1.0, -1.0] + [-5.0] * 20, np.float32)

    def chosen(self, margin: float, resident: list[int], top_k: int = 2) -> set[int]:
        steering = Steering(Scoring(), None, top_k, margin)
        here = np.isin(np.arange(25), resident)
        steered = steering(self.LOGITS, here)
        logits = self.LOGITS if steered is None else steered
        return set(np.argsort(-logits, kind="stable")[:top_k].tolist())

    def test_only_within_the_margin(self) -> None:
        assert self.chosen(0.4, [2]) == {0, 1}
        assert self.chosen(0.5, [2]) == {0, 2}
        assert self.chosen(0.99, [3]) == {0, 1}
        assert self.chosen(1.0, [3]) == {0, 3}

    def test_the_weakest_gives_way_first_and_the_best_comes_first(self) -> None:
        assert self.chosen(1.5, [2]) == {0, 2}
        assert self.chosen(1.0, [2, 3]) == {0, 2}
        assert self.chosen(2.0, [2, 3], top_k=2) == {2, 3}

    def test_what_is_in_memory_stays(self) -> None:
        assert self.chosen(9.0, [0, 1, 2, 3, 4]) == {0, 1}
        assert self.chosen(9.0, [1, 2]) == {1, 2}
        assert self.chosen(9.0, []) == {0, 1}

    def test_logits_of_the_chosen_and_every_softmax_stay(self) -> None:
        steered = Steering(Scoring(), None, 2, 1.0)(self.LOGITS, np.arange(25) == 2)
        assert steered is not None
        np.testing.assert_array_equal(steered[[0, 2]], self.LOGITS[[0, 2]])
        assert np.delete(steered, [0, 2]).max() < 1.5
        np.testing.assert_allclose(np.exp(steered).sum(), np.exp(self.LOGITS).sum(), rtol=1e-6)

    def test_no_replacement_below_the_mean_of_those_left_out(self) -> None:
        logits = np.array([3.0, 2.9, 2.8, 0.0], np.float32)
        assert Steering(Scoring(), None, 1, 9.0)(logits, np.arange(4) == 3) is None

    def test_groups_that_are_not_chosen_from_stay_out(self) -> None:
        scoring = Scoring(mx.sigmoid, True, Groups(count=2, kept=1, best=2))
        steering = Steering(scoring, mx.zeros(4), 1, 9.0)
        logits = np.array([2.0, 1.0, 1.4, -3.0], np.float32)
        assert steering(logits, np.arange(4) == 2) is None
        steered = steering(logits, np.arange(4) == 1)
        assert steered is not None
        assert steered.argmax() == 1


@pytest.mark.parametrize("family", WITHOUT)
def test_families_without_routers_are_refused(family: str) -> None:
    config = FAMILIES[family]
    with pytest.raises(OptionError, match=f"{config['model_type']} models"):
        find_steerable(config)
