"""What `flashmoe generate` prints, as text and as JSON, and what its options do to an answer."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from flashmoe.cli.console import report_lines
from flashmoe.demo import DEMO_FOLDER
from flashmoe.generation.report import Report
from flashmoe.store.manifest import MANIFEST_NAME
from flashmoe.store.reader import open_store
from tests.support.answers import BARN, CAPITAL, CAPITAL_ANSWER, CAPITAL_TOKENS
from tests.support.commands import Result, Run


def ask(run: Run, *arguments: object, stdin: bytes = b"") -> dict[str, Any]:
    """The JSON that `flashmoe generate` prints of an answer."""
    answer: dict[str, Any] = run("generate", *arguments, "--json", stdin=stdin).json()
    return answer


def test_generate_text_and_stats(run_cli: Run, demo_store: Path) -> None:
    result = run_cli("generate", demo_store, "-p", CAPITAL, "--cache", "2MB", "--stats")
    assert (result.code, result.err) == (0, "")
    answer, line, details, *times = result.out.splitlines()
    assert answer == CAPITAL_ANSWER
    parts = re.fullmatch(
        r"6 tokens · [\d.]+ tok/s · first token [\d.]+ s · hit rate (\d+)% · "
        r"(\d+) kB read/token · bank 1\.9\d MB · peak memory [\d.]+ MB",
        line,
    )
    assert parts is not None, line
    assert int(parts[1]) < 50
    assert int(parts[2]) > 100
    counts = re.fullmatch(
        r"19 prompt tokens \(0 cached\) · \d+ hits · (\d+) misses · "
        r"([\d.]+) MB read of [\d.]+ MB demanded",
        details,
    )
    assert counts is not None, details
    assert int(counts[1]) > 0
    assert float(counts[2]) > 0
    phases = (
        r"attention and router (\d+)% · waiting for reads (\d+)% · experts (\d+)% · host (\d+)%"
    )
    for line, part in zip(times, ("prefill", "decode"), strict=True):
        shares = re.fullmatch(rf"{part} [\d.]+ s: {phases}", line)
        assert shares is not None, line
        assert 98 <= sum(map(int, shares.groups())) <= 102


def test_stats_of_a_prefetch() -> None:
    report = Report(prefetched=8, prefetched_used=6, not_prefetched=4, bytes_wasted=2_500_000)
    assert report_lines(report)[2] == (
        "8 records prefetched · precision 75% · recall 60% · 2.50 MB read in vain"
    )
    assert len(report_lines(Report(not_prefetched=4))) == 2


def test_generate_prints_no_stats_unasked(run_cli: Run, demo_store: Path) -> None:
    result = run_cli("generate", demo_store, "--prompt", CAPITAL, "--cache", "min")
    assert result == Result(0, f"{CAPITAL_ANSWER}\n", "")


def test_generate_json(run_cli: Run, demo_store: Path) -> None:
    small = ask(run_cli, demo_store, "-p", CAPITAL, "--cache", "2MB")
    assert list(small) == ["text", "tokens", "finish_reason", "stats"]
    assert small["text"] == CAPITAL_ANSWER
    assert small["tokens"] == CAPITAL_TOKENS
    assert small["finish_reason"] == "stop"
    stats = small["stats"]
    assert {field.name for field in fields(Report)} < set(stats)
    counted = ("prompt_tokens", "cached_tokens", "generated_tokens")
    assert [stats[name] for name in counted] == [19, 0, 6]
    assert stats["misses"] > 0
    record_bytes = open_store(demo_store).manifest.layers[0].layout.record.stride
    assert stats["bytes_read"] == stats["misses"] * record_bytes
    assert stats["hit_rate"] == stats["hits"] / (stats["hits"] + stats["misses"])
    assert stats["bytes_read_per_token"] == stats["bytes_read"] / (19 + 6 - 1)
    assert 0 < stats["bank_bytes"] <= 2_000_000
    assert stats["peak_memory_bytes"] > stats["bank_bytes"]
    assert stats["tokens_per_second"] > 0
    assert stats["seconds_to_first_token"] > 0
    seconds = stats["seconds"]
    for part in ("prefill", "decode"):
        assert sum(seconds[f"in_{part}"].values()) == pytest.approx(seconds[part], rel=0.05)
    # Records this small are never prefetched for.
    assert (stats["prefetched"], stats["not_prefetched"], stats["bytes_wasted"]) == (0, 0, 0)
    assert stats["prefetch_precision"] is stats["prefetch_recall"] is None


def test_generate_is_the_same_with_any_cache(run_cli: Run, demo_store: Path) -> None:
    sampled = ("-p", "Once", "--temp", "1", "--seed", "3", "--max-tokens", "8")
    for question in (("-p", CAPITAL), sampled):
        answers = [ask(run_cli, demo_store, *question, "--cache", c) for c in ("2MB", "64MB")]
        small, large = answers
        assert small["tokens"] == large["tokens"]
        assert small["stats"]["misses"] > large["stats"]["misses"]
        assert large["stats"]["misses"] <= 192
        assert large["stats"]["bank_bytes"] <= 64_000_000


def test_generate_reads_the_prompt_from_stdin(run_cli: Run, demo_store: Path) -> None:
    assert ask(run_cli, demo_store, "-p", "-", stdin=CAPITAL.encode())["tokens"] == CAPITAL_TOKENS


def test_seed_makes_sampling_repeatable(run_cli: Run, demo_store: Path) -> None:
    def tokens(seed: int) -> list[int]:
        drawn = ("--temp", "1.5", "--max-tokens", "12", "--seed", seed)
        found: list[int] = ask(run_cli, demo_store, "-p", BARN, *drawn)["tokens"]
        return found

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_sampling_without_a_seed_varies(run_cli: Run, demo_store: Path) -> None:
    drawn = ("--temp", "5", "--max-tokens", "12")
    answers = [ask(run_cli, demo_store, "-p", "Once", *drawn)["tokens"] for _ in range(2)]
    assert answers[0] != answers[1]


def test_max_tokens_ends_an_answer(run_cli: Run, demo_store: Path) -> None:
    answer = ask(run_cli, demo_store, "-p", CAPITAL, "--max-tokens", "2")
    assert answer["tokens"] == CAPITAL_TOKENS[:2]
    assert answer["finish_reason"] == "length"
    assert answer["stats"]["generated_tokens"] == 2


def test_context_ends_an_answer(run_cli: Run, demo_store: Path) -> None:
    # 19 tokens of prompt and 2 that are fed; the third is sampled and never fed.
    answer = ask(run_cli, demo_store, "-p", CAPITAL, "--context", "21")
    assert answer["tokens"] == CAPITAL_TOKENS[:3]
    assert answer["finish_reason"] == "length"


def test_no_template_feeds_the_text_as_it_is(run_cli: Run, demo_store: Path) -> None:
    rendered = f"<|im_start|>user\n{CAPITAL}<|im_end|>\n<|im_start|>assistant\n"
    bare = ask(run_cli, demo_store, "-p", CAPITAL, "--no-template")
    assert bare["stats"]["prompt_tokens"] < 19
    same = ask(run_cli, demo_store, "-p", rendered, "--no-template")
    assert same["stats"]["prompt_tokens"] == 19
    assert same["tokens"] == CAPITAL_TOKENS


def test_system_prompt_goes_first(run_cli: Run, demo_store: Path) -> None:
    rendered = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    rendered += "<|im_start|>assistant\n"
    told = ask(run_cli, demo_store, "-p", "Hello", "--system", "Be brief.")
    same = ask(run_cli, demo_store, "-p", rendered, "--no-template")
    assert told["tokens"] == same["tokens"]
    assert told["stats"]["prompt_tokens"] == same["stats"]["prompt_tokens"] > 11


def test_first_use_repacks_and_the_second_does_not(run_cli: Run, home: Path) -> None:
    first = ask(run_cli, "-p", CAPITAL)
    stores = list((home / ".cache/flashmoe").glob("*.flashmoe"))
    assert len(stores) == 1
    manifest = stores[0] / MANIFEST_NAME
    written = manifest.stat().st_mtime_ns
    assert ask(run_cli, DEMO_FOLDER, "-p", CAPITAL)["tokens"] == first["tokens"] == CAPITAL_TOKENS
    assert list((home / ".cache/flashmoe").glob("*.flashmoe")) == stores
    assert manifest.stat().st_mtime_ns == written
    assert run_cli("verify", stores[0], "--json").json()["ok"] is True
