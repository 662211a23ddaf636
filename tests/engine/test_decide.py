"""Deciding a run: pure, every byte accounted for, and never less for more."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe import FlashMoEModel, MemoryBudgetError, OptionError, Options, plan_run
from flashmoe.checkpoint.source import resolve
from flashmoe.demo import DEMO_FOLDER
from flashmoe.engine.decide import decide
from flashmoe.engine.facts import MachineFacts, ModelFacts
from flashmoe.engine.plan import RunPlan
from flashmoe.io.depth import Depth
from flashmoe.io.select import ReadSettings
from flashmoe.memory.budget import JITTER_BYTES
from flashmoe.probe.tuning import Choice, Reads
from flashmoe.repacking.repack import plan_store
from flashmoe.store.layout import TensorSpec
from flashmoe.store.reader import open_store
from tests.support.commands import Run
from tests.support.stores import layer_layout

MB = 10**6
HERE = MachineFacts(
    process_bytes=100 * MB,
    usable_bytes=16_000 * MB,
    on_cpu=True,
    missing_kernels={"cpu": None, "metal": "no GPU", "reference": None},
    reader_notes={"pread": "native library, 8 threads", "mmap": "memory maps"},
    uncached_problem=None,
)
GPU = replace(HERE, on_cpu=False, missing_kernels={"cpu": None, "metal": None, "reference": None})


@cache
def demo_facts() -> ModelFacts:
    return ModelFacts.of_plan(*plan_store(resolve(DEMO_FOLDER)))


@pytest.fixture
def facts() -> ModelFacts:
    return demo_facts()


def resized(shapes: list[tuple[int, int, int]]) -> ModelFacts:
    """The demo model with other layers: (rows of a weight, experts, top-k) of each."""
    layers = tuple(
        layer_layout(
            number,
            (TensorSpec("gate_proj.weight", "U32", (rows, 1024)),),
            n_experts=max(experts, top_k),
            top_k=top_k,
        )
        for number, (rows, experts, top_k) in enumerate(shapes)
    )
    return replace(demo_facts(), layers=layers)


SHAPES = st.lists(
    st.tuples(st.integers(1, 300), st.integers(1, 64), st.integers(1, 8)), min_size=1, max_size=8
)
MEMORY = st.integers(200 * MB, 6_000 * MB)


@settings(max_examples=150)
@given(
    shapes=SHAPES,
    memory=MEMORY,
    more=st.integers(0, 800 * MB),
    chunk=st.none() | st.integers(1, 4096),
    context=st.none() | st.integers(1, 2048),
    machine=st.sampled_from([HERE, GPU]),
)
def test_bytes_add_up_and_more_memory_never_makes_a_smaller_bank(
    shapes: list[tuple[int, int, int]],
    memory: int,
    more: int,
    chunk: int | None,
    context: int | None,
    machine: MachineFacts,
) -> None:
    model = resized(shapes)
    options = Options(memory=memory, prefill_chunk=chunk, context=context)
    plan = decide(model, options, machine)
    larger = decide(model, replace(options, memory=memory + more), machine)
    for found in (plan, larger):
        total = found.memory
        rows = sum(size_bytes for _, size_bytes, _ in found.rows()) - total.lent_bytes
        assert rows == total.planned_bytes
        assert total.total_bytes is not None
        assert found.fits == (rows <= total.total_bytes)
        # The least has room for a process that is a little larger the next time.
        assert found.fits == (total.total_bytes > total.least_total_bytes - JITTER_BYTES - 2)
        pairs = zip(total.slots, found.needs.demands, strict=True)
        assert sum(n * demand.slot_bytes for n, demand in pairs) == total.bank_bytes
        if found.fits:
            found.check()
        else:
            with pytest.raises(MemoryBudgetError) as caught:
                found.check()
            assert caught.value.least_bytes == total.least_total_bytes
    assert larger.fits or not plan.fits
    if plan.fits:
        assert larger.memory.bank_bytes >= plan.memory.bank_bytes
        assert larger.memory.prompts.nbytes >= plan.memory.prompts.nbytes
    least = plan.memory.least_total_bytes
    assert decide(model, replace(options, memory=least), machine).fits


@given(shapes=SHAPES, memory=MEMORY, warm=st.booleans())
@settings(max_examples=25)
def test_equal_input_gives_an_equal_plan(
    shapes: list[tuple[int, int, int]], memory: int, warm: bool
) -> None:
    options = Options(memory=memory, warm_start=warm)
    one, two = (decide(resized(shapes), replace(options), replace(HERE)) for _ in range(2))
    assert one == two
    assert json.dumps(one.as_dict()) == json.dumps(two.as_dict())


def test_facts_of_a_store_and_of_its_checkpoint_are_the_same(demo_store: Path) -> None:
    options = Options(memory="1GB", tuned=False)
    stored = plan_run(open_store(demo_store), options)
    planned = plan_run(DEMO_FOLDER, options)
    assert stored.facts == planned.facts
    assert plan_run(None, options).facts == stored.facts
    assert plan_run(demo_store, options).facts == stored.facts


def test_a_plan_is_frozen(facts: ModelFacts) -> None:
    plan = decide(facts, Options(), HERE)
    with pytest.raises(FrozenInstanceError):
        plan.context = 1  # type: ignore[misc]


def decided(facts: ModelFacts, machine: MachineFacts = HERE, **options: Any) -> RunPlan:
    return decide(facts, Options(**options), machine)


def test_kernel_and_reader_come_with_a_reason(facts: ModelFacts) -> None:
    plan = decided(facts)
    assert (plan.kernel, plan.kernel_reason) == (
        "cpu",
        "written for the device that MLX computes on",
    )
    assert (plan.reader, plan.reader_reason) == ("pread", "native library, 8 threads")
    without = replace(HERE, missing_kernels={**HERE.missing_kernels, "cpu": "it was not built"})
    fallen = decided(facts, without)
    assert fallen.kernel == "reference"
    assert "it was not built" in fallen.kernel_reason
    assert not fallen.native_attention
    assert decided(facts, GPU).kernel == "metal"
    assert decided(facts, kernel="reference").kernel_reason == "as asked"


def test_the_page_cache_comes_with_a_reason(facts: ModelFacts) -> None:
    fits = decided(facts)
    assert (fits.page_cache, fits.page_cache_reason) == (
        True,
        "all records fit into the memory that is left",
    )
    small = replace(HERE, usable_bytes=40 * MB)
    assert not decided(facts, small, cache="min").page_cache
    needed = replace(small, uncached_problem="Invalid argument")
    plan = decided(facts, needed, cache="min")
    assert plan.page_cache and "Invalid argument" in plan.page_cache_reason
    with pytest.raises(OptionError, match="leave the page cache on"):
        decided(facts, needed, cache="min", page_cache=False)


def test_tuning_decides_what_was_left_open(facts: ModelFacts) -> None:
    tuned = Choice(cached=Reads(ReadSettings("mmap", Depth(3)), ReadSettings("pread", Depth(5))))
    plan = decide(facts, Options(), HERE, tuned)
    assert (plan.reader, plan.reads) == ("mmap", tuned.cached)
    asked = decide(facts, Options(reader="pread"), HERE, tuned)
    assert (asked.reader, asked.reads.prefill) == ("pread", tuned.cached.prefill)


def test_what_is_lossy_is_said(facts: ModelFacts) -> None:
    assert decided(facts).lossy == ()
    plan = decided(facts, experts_per_token=1, route_bias=0.5)
    assert plan.lossy == ("1 of 2 experts per token", "route bias 0.5")
    assert {layer.top_k for layer in plan.facts.layers} == {1}
    assert len(plan.steerable) == len(plan.facts.layers)
    assert decided(facts, experts_per_token=2).lossy == ()


def test_a_context_beyond_the_model_is_refused(facts: ModelFacts) -> None:
    with pytest.raises(OptionError, match="context 4096 exceeds the 2048 tokens"):
        decided(facts, context=4096)
    assert decided(facts).context == 2048


def test_a_chunk_that_was_asked_for_is_named_when_it_does_not_fit(facts: ModelFacts) -> None:
    plan = decided(facts, memory="150MB", prefill_chunk=2048)
    assert not plan.fits
    with pytest.raises(MemoryBudgetError, match="fewer tokens than 2048"):
        plan.check()


def test_a_model_runs_as_planned(demo_store: Path) -> None:
    with FlashMoEModel.from_pretrained(demo_store, memory="4GB") as model:
        assert model.plan == replace(
            plan_run(demo_store, memory="4GB"),
            memory=model.plan.memory,
            found_bytes=model.plan.found_bytes,
        )
        streaming = model._running.streaming
        assert streaming is not None
        assert tuple(streaming.slots()) == model.plan.memory.slots


class TestInfo:
    def test_as_a_table(self, run_cli: Run, demo_store: Path) -> None:
        shown = run_cli("info", demo_store, "--memory", "1GB")
        assert (shown.code, shown.err) == (0, "")
        names = [line.split("  ")[0] for line in shown.out.splitlines()]
        for name in ("process", "resident weights", "KV cache", "bank", "kernel", "least memory"):
            assert name in names
        assert "32 of 32 experts in each of 6 layers" in shown.out

    def test_as_data(self, run_cli: Run, demo_store: Path) -> None:
        found = run_cli("info", demo_store, "--memory", "1GB", "--json").json()
        assert found["fits"] is True
        assert found["memory"]["slots"] == [32] * 6
        assert found["memory"]["planned_bytes"] <= 10**9
        assert found["least_memory_bytes"] < 10**9

    def test_what_does_not_fit(self, run_cli: Run, demo_store: Path) -> None:
        shown = run_cli("info", demo_store, "--memory", "60MB")
        assert shown.code == 0
        assert "This does not fit: 60.0 MB of memory is not enough" in shown.out
        assert run_cli("info", demo_store, "--memory", "60MB", "--json").json()["fits"] is False

    def test_of_a_checkpoint(self, run_cli: Run) -> None:
        shown = run_cli("info", DEMO_FOLDER, "--memory", "1GB")
        assert "32 of 32 experts in each of 6 layers" in shown.out

    def test_options_need_a_model(self, run_cli: Run) -> None:
        shown = run_cli("info", "--memory", "1GB")
        assert shown.code == 2
        assert "name a store or a checkpoint" in shown.err
