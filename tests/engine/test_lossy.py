"""Lossy options: exact while they are off, said aloud while they are on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

import flashmoe
from flashmoe import FlashMoEModel, OptionError
from flashmoe.checkpoint.architecture import probe_routing
from flashmoe.checkpoint.top_k import TOP_K_KEYS, with_experts_per_token
from flashmoe.store.reader import Store
from tests.support.answers import BARN, CAPITAL, CAPITAL_TOKENS
from tests.support.commands import Run, assert_one_line
from tests.support.families import FAMILIES, save_checkpoint
from tests.support.natives import compiled

TOKENS = (5, 90, 41, 7, 63, 12, 3)


def logits(module: Any) -> list[np.ndarray]:
    cache = make_prompt_cache(module)
    outputs = [np.array(module(mx.array([list(range(9))]), cache=cache))]
    return outputs + [np.array(module(mx.array([[token]]), cache=cache)) for token in TOKENS]


def run(store: Store, **options: Any) -> tuple[list[np.ndarray], FlashMoEModel]:
    with FlashMoEModel(store, dtype="float32", **options) as model:
        found = logits(model.model)
        model.check_integrity()
    return found, model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lossy") / "checkpoint"
    save_checkpoint(folder, "qwen3_moe")
    return folder


@pytest.fixture(scope="module")
def qwen_store(checkpoint: Path) -> Store:
    return flashmoe.repack(checkpoint, checkpoint.with_name("store"))


class TestExpertsPerToken:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_can_have_fewer(self, family: str) -> None:
        config = FAMILIES[family]
        trained = probe_routing(config)
        changed, routing = with_experts_per_token(config, 1, trained)
        assert set(routing.top_k.values()) == {1}
        assert set(probe_routing(changed).top_k.values()) == {1}
        assert probe_routing(config).top_k == trained.top_k

    @pytest.mark.parametrize("count", [-1, 0, 3])
    def test_no_more_than_trained_and_no_fewer_than_one(self, count: int) -> None:
        config = FAMILIES["qwen3_moe"]
        with pytest.raises(OptionError, match=f"from 1 to 2.*not {count}"):
            with_experts_per_token(config, count, probe_routing(config))

    def test_a_top_k_that_does_not_follow_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = FAMILIES["qwen3_moe"]
        monkeypatch.setattr("flashmoe.checkpoint.top_k.TOP_K_KEYS", ("unheard_of",))
        assert "num_experts_per_tok" in TOP_K_KEYS
        with pytest.raises(OptionError, match="qwen3_moe"):
            with_experts_per_token(config, 1, probe_routing(config))

    @pytest.mark.parametrize("cache", ["min", "1GB"])
    def test_as_stock_mlx_lm_with_that_config(
        self, checkpoint: Path, qwen_store: Store, cache: str
    ) -> None:
        resident, _ = load_model(checkpoint, model_config={"num_experts_per_tok": 1})
        found, model = run(qwen_store, cache=cache, kernel="reference", experts_per_token=1)
        for ours, theirs in zip(found, logits(resident), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert {layer.top_k for layer in model.plan.facts.layers} == {1}
        assert model.lossy == ("1 of 2 experts per token",)

    def test_one_token_needs_less(self, qwen_store: Store) -> None:
        _, trained = run(qwen_store, cache="min")
        _, fewer = run(qwen_store, cache="min", experts_per_token=1)
        assert fewer.bank_bytes * 2 == trained.bank_bytes
        accesses = [m.totals().hits + m.totals().misses for m in (trained, fewer)]
        assert accesses[1] < accesses[0]

    def test_as_many_as_trained_is_exact(self, qwen_store: Store) -> None:
        expected, _ = run(qwen_store, cache="min")
        found, model = run(qwen_store, cache="min", experts_per_token=2)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert model.lossy == ()


@compiled
class TestRouteBias:
    def test_zero_is_off_and_a_full_bank_is_exact(self, qwen_store: Store) -> None:
        expected, plain = run(qwen_store, cache="min")
        assert plain.lossy == ()
        off, model = run(qwen_store, cache="min", route_bias=0.0)
        assert model.lossy == ()
        with FlashMoEModel(qwen_store, dtype="float32", cache="1GB", route_bias=50.0) as model:
            for bank, layer in zip(
                model._running.streaming.banks, qwen_store.manifest.layers, strict=True
            ):  # type: ignore[union-attr]
                for expert in range(layer.layout.n_experts):
                    bank.acquire([expert])
            full = logits(model.model)
        for ours, also, theirs in zip(off, full, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
            np.testing.assert_array_equal(also, theirs)

    def test_prompts_are_exact(self, qwen_store: Store) -> None:
        expected, _ = run(qwen_store, cache="min")
        found, _ = run(qwen_store, cache="min", route_bias=50.0)
        np.testing.assert_array_equal(found[0], expected[0])
        assert any(not np.array_equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_the_same_bank_gives_the_same_output(self, qwen_store: Store) -> None:
        first, _ = run(qwen_store, cache="min", route_bias=1.0)
        second, _ = run(qwen_store, cache="min", route_bias=1.0)
        for ours, theirs in zip(first, second, strict=True):
            np.testing.assert_array_equal(ours, theirs)

    def test_a_wider_margin_misses_less(self, demo_store: Path) -> None:
        misses = []
        for bias in (0.0, 1.0, 4.0):
            with FlashMoEModel.from_pretrained(demo_store, cache="4MB", route_bias=bias) as model:
                list(model.stream(BARN, 24))
                misses.append(model.totals().misses)
                model.check_integrity()
        assert misses[0] > misses[1] > misses[2]

    def test_families_without_routers_are_refused_at_load(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "checkpoint", "nemotron_h")
        store = flashmoe.repack(tmp_path / "checkpoint", tmp_path / "store")
        with pytest.raises(OptionError, match="nemotron_h"):
            FlashMoEModel(store, route_bias=1.0)


class TestCommands:
    def test_json_and_stats_say_so(self, run_cli: Run, demo_store: Path) -> None:
        arguments = ("generate", demo_store, "-p", CAPITAL)
        exact = run_cli(*arguments, "--json").json()
        assert (exact["tokens"], exact["stats"]["lossy"]) == (CAPITAL_TOKENS, [])
        lossy = run_cli(
            *arguments, "--json", "--experts-per-token", "1", "--route-bias", "0.5"
        ).json()
        assert lossy["stats"]["lossy"] == ["1 of 2 experts per token", "route bias 0.5"]
        told = run_cli(*arguments, "--stats", "--route-bias", "0.5").out
        assert "lossy: route bias 0.5" in told
        assert "lossy" not in run_cli(*arguments, "--stats").out

    def test_chat_says_so_once(self, run_cli: Run, demo_store: Path) -> None:
        told = run_cli("chat", demo_store, "--experts-per-token", "1", stdin=b"/exit\n").out
        assert told.count("lossy: 1 of 2 experts per token") == 1
        assert "lossy" not in run_cli("chat", demo_store, stdin=b"/exit\n").out

    @pytest.mark.parametrize(
        ("option", "value", "part"),
        [
            ("--experts-per-token", "0", "experts per token"),
            ("--experts-per-token", "3", "from 1 to 2"),
            ("--route-bias", "-1", "route bias"),
            ("--route-bias", "nan", "route bias"),
            ("--route-bias", "inf", "route bias"),
        ],
    )
    def test_values_that_make_no_sense(
        self, run_cli: Run, demo_store: Path, option: str, value: str, part: str
    ) -> None:
        assert_one_line(run_cli("generate", demo_store, "-p", CAPITAL, option, value), 2, part)

    @pytest.mark.parametrize("command", ["chat", "generate"])
    def test_help_calls_them_lossy(self, run_cli: Run, command: str) -> None:
        text = " ".join(run_cli(command, "--help").out.split())
        assert text.count("LOSSY") == 2
