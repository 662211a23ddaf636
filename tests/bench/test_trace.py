"""`flashmoe trace` and `flashmoe bench cache`: recording a running model, and replaying it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe import FlashMoEModel
from flashmoe.bank.policy.select import AUTO, POLICY_NAMES, make_policy
from flashmoe.base.errors import FlashMoEError, OptionError, PromptError
from flashmoe.bench.cache import bench_cache
from flashmoe.bench.replay import layer_steps, replay
from flashmoe.bench.trace import RoutingRecorder, record_routing
from flashmoe.bench.trace_file import Trace, TracedLayer, TraceWriter, read_trace
from flashmoe.generation.session import Sampling
from flashmoe.model.load import stream_experts
from tests.support.answers import BARN, CAPITAL
from tests.support.commands import Run, assert_one_line
from tests.support.traces import write_trace

PROMPTS = (CAPITAL, BARN)


def record(model: FlashMoEModel, path: Path, **options: object) -> Trace:
    sampling = Sampling(**options)  # type: ignore[arg-type]
    record_routing(model, PROMPTS, path, max_tokens=12, sampling=sampling)
    return read_trace(path)


@pytest.fixture(scope="module")
def demo_trace(demo: FlashMoEModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("trace") / "demo.trace"
    record(demo, path)
    yield path


def test_what_is_recorded(demo: FlashMoEModel, demo_trace: Path) -> None:
    trace = read_trace(demo_trace)
    assert trace.layers == (
        tuple(TracedLayer(f"model.layers.{i}.mlp.switch_mlp", 32, 2, 98304) for i in range(6))
    )
    # A prompt's last token is fed alone, and an answer's last token never.
    assert trace.step_tokens.tolist()[:3] == [18, 1, 1]
    starts = [trace.step_prompt.tolist().index(number) for number in (0, 1)]
    assert trace.step_tokens[starts[1]] > 1
    assert (trace.step_tokens > 1).sum() == 2
    seen: list[np.ndarray] = []
    demo.observe_routing(lambda layer, experts: seen.append(experts) if layer == 3 else None)
    demo.generate(CAPITAL, max_new_tokens=12)
    demo.observe_routing(None)
    rows = np.concatenate([experts.reshape(-1, 2) for experts in seen])
    np.testing.assert_array_equal(trace.routed(3)[: len(rows)], rows)
    assert len(rows) == int(trace.step_tokens[: starts[1]].sum())


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_replay_misses_as_the_running_model_does(
    demo_store: Path, demo_trace: Path, tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_staging(*arguments: Any, **options: Any) -> Any:
        return stream_experts(*arguments, **{**options, "group_records": 0})

    monkeypatch.setattr("flashmoe.engine.api.stream_experts", without_staging)
    with FlashMoEModel.from_pretrained(demo_store, cache="5.2MB", policy=policy) as model:
        slots = model.memory_plan.slots
        assert len(set(slots)) == 2
        trace = record(model, tmp_path / "small.trace")
        stats = model.stats()
    assert (tmp_path / "small.trace").read_bytes() == demo_trace.read_bytes()
    steps = [layer_steps(trace, i) for i in range(6)]
    hits = sum(replay(x, make_policy(policy, n)) for x, n in zip(steps, slots, strict=True))
    assert hits == stats.hits > 0
    assert sum(len(step) for layer in steps for step in layer) == stats.hits + stats.misses


def test_sampling_is_seeded(demo: FlashMoEModel, tmp_path: Path) -> None:
    traces = [
        record(demo, tmp_path / name, temperature=2.0, seed=seed).experts.tolist()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert traces[0] == traces[1] != traces[2]


def test_a_prompt_that_fails_leaves_no_file(demo: FlashMoEModel, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="prompt 2: the prompt is empty"):
        record_routing(
            demo, ["Hello", " "], tmp_path / "x", max_tokens=4, sampling=Sampling(), template=False
        )
    assert list(tmp_path.iterdir()) == []
    # Nobody listens any more.
    demo.generate("Hello", max_new_tokens=2)
    with pytest.raises(PromptError, match="no prompts"):
        record_routing(demo, [], tmp_path / "x", max_tokens=4, sampling=Sampling())


def test_only_traces_are_written_over(demo: FlashMoEModel, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "x"
    prompts.write_text("Hello")
    for path in (tmp_path, prompts):
        with pytest.raises(OptionError, match="is no trace; name another"):
            record_routing(demo, ["Hello"], path, max_tokens=4, sampling=Sampling())
    assert prompts.read_text() == "Hello"
    sizes = [
        record_routing(demo, texts, out, max_tokens=4, sampling=Sampling()).file_bytes
        for texts in (["Hello"], ["Hello"] * 2)
    ]
    assert sizes[0] < sizes[1] == out.stat().st_size


def test_closed_models_cannot_be_observed(demo_store: Path) -> None:
    model = FlashMoEModel.from_pretrained(demo_store, cache="min")
    model.close()
    with pytest.raises(FlashMoEError, match="closed"):
        model.observe_routing(None)


def test_layers_called_unevenly_are_refused(tmp_path: Path) -> None:
    layers = [TracedLayer(f"layers.{i}", 8, 2, 4096) for i in range(2)]
    with TraceWriter(tmp_path / "x", "tiny", layers) as writer:
        recorder = RoutingRecorder(writer, 2)
        recorder.observe(0, np.zeros((1, 3, 2), np.uint32))
        with pytest.raises(FlashMoEError, match="once each"):
            recorder.observe(0, np.zeros((1, 3, 2), np.uint32))
        with pytest.raises(FlashMoEError, match="once each"):
            recorder.observe(1, np.zeros((1, 2, 2), np.uint32))


def test_chunks_are_walked_in_disk_order(tmp_path: Path) -> None:
    experts = write_trace(tmp_path / "x")
    trace = read_trace(tmp_path / "x")
    first = sorted(set(experts[:4, :2].ravel().tolist()))
    alone = sorted(experts[4, :2].tolist())
    steps = layer_steps(trace, 0)
    groups = [first[i : i + 2] for i in range(0, len(first), 2)]
    assert steps[: len(groups) + 1] == [*groups, alone]
    assert layer_steps(trace, 0, decode_only=True) == [sorted(experts[i, :2]) for i in (4, 5, 9)]


def test_cache_report(demo_trace: Path) -> None:
    calls: list[tuple[int, ...]] = []
    report = bench_cache(
        demo_trace,
        shares=(0.5, 0.05, 1.0),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert (report.model, report.prompts, report.default) == ("qwen3_moe", 2, AUTO)
    # 5 % of 32 is one token's needs.
    assert [(x.share, x.slots) for x in report.results] == [
        (None, (2,) * 6),
        (0.5, (16,) * 6),
        (1.0, (32,) * 6),
    ]
    least, half, full = report.results
    assert half.bank_bytes == 6 * 16 * 98304
    assert list(half.hit_rates) == list(POLICY_NAMES)
    for result in report.results:
        assert all(rate <= result.belady < 1 for rate in result.hit_rates.values())
        for slots in result.slots_by_need.values():
            assert sum(slots) == sum(result.slots)
    # By the trace's own need an LRU is never worse; with every expert in memory all are the same.
    assert least.by_need["lru"] == least.hit_rates["lru"] < half.hit_rates["lru"]
    assert half.by_need["lru"] >= half.hit_rates["lru"]
    assert {*full.hit_rates.values(), *full.by_need.values()} == {full.belady}
    assert half.times_belady == pytest.approx((1 - half.hit_rates[AUTO]) / (1 - half.belady))
    assert calls == [(done, 24) for done in range(25)]


def test_cache_of_decode_only(demo_trace: Path) -> None:
    trace = read_trace(demo_trace)
    report = bench_cache(demo_trace, shares=(0.5,), decode_only=True)
    assert report.accesses == 12 * int((trace.step_tokens == 1).sum())


def test_need_from_another_trace(demo_trace: Path, tmp_path: Path) -> None:
    write_trace(tmp_path / "tiny")
    write_trace(tmp_path / "other", seed=1)
    own = bench_cache(tmp_path / "tiny", shares=(0.6,))
    others = bench_cache(tmp_path / "tiny", shares=(0.6,), need_from=tmp_path / "other")
    assert others.results[1].hit_rates == own.results[1].hit_rates
    assert others.results[1].by_need["lru"] <= own.results[1].by_need["lru"]
    with pytest.raises(OptionError, match="different models"):
        bench_cache(tmp_path / "tiny", need_from=demo_trace)


def test_commands(run_cli: Run, demo_store: Path, demo_trace: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "demo.trace"
    prompts.write_text(f"{CAPITAL}\n\n  {BARN}  \n")
    arguments = ("trace", demo_store, out, "--prompts", prompts, "--max-tokens", "12")
    summary = run_cli(*arguments, "--json").json()
    assert out.read_bytes() == demo_trace.read_bytes()
    tokens = int(read_trace(out).step_tokens.sum())
    assert summary == {
        "trace": str(out),
        "prompts": 2,
        "tokens": tokens,
        "prompt_tokens": 19 + 16,
        "layers": 6,
        "accesses": tokens * 12,
        "file_bytes": out.stat().st_size,
    }
    assert f"2 prompts, {tokens} tokens (35 of prompts)" in run_cli(*arguments).out

    report = run_cli("bench", "cache", out, "--share", "0.5", "--json").json()
    assert [result["share"] for result in report["results"]] == [None, 0.5]
    assert report == json.loads(json.dumps(report))
    table = run_cli("bench", "cache", out, "--share", "0.5", "--decode-only").out
    assert "Belady" in table
    assert " 50% " in table


def test_default_prompts(run_cli: Run, demo_store: Path, tmp_path: Path) -> None:
    short = ("--max-tokens", "2", "--temp", "1", "--seed", "5", "--json")
    summary = run_cli("trace", demo_store, tmp_path / "x", *short).json()
    assert summary["prompts"] == 6


def test_refusals(run_cli: Run, demo_store: Path, demo_trace: Path, tmp_path: Path) -> None:
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n \n")
    latin.write_bytes(b"caf\xe9\n")
    out = tmp_path / "new.trace"
    for prompts, word in ((empty, "no prompts"), (latin, "UTF-8"), (tmp_path / "no", "No such")):
        result = run_cli("trace", demo_store, out, "--prompts", prompts)
        assert_one_line(result, 1, str(prompts), word)
    assert_one_line(run_cli("trace", demo_store, tmp_path / "no" / "x"), 1, "No such")
    assert_one_line(run_cli("trace", demo_store, out, "--max-tokens", "0"), 2, "0")
    assert_one_line(run_cli("trace", demo_store), 2, "OUT")
    assert_one_line(run_cli("bench", "cache", tmp_path / "missing"), 1, "missing")
    assert_one_line(run_cli("bench", "cache", latin), 1, "latin.txt")
    for share in ("0", "1.5", "nan"):
        assert_one_line(run_cli("bench", "cache", demo_trace, "--share", share), 2, "share")
    assert not out.exists()
