"""Expected failures: one line on stderr that names what is wrong, and no traceback."""

import os
import signal
from pathlib import Path

import pytest

from flashmoe.store.manifest import MANIFEST_NAME
from tests.support.answers import BARN
from tests.support.commands import Run, assert_one_line
from tests.support.hub import Hub

FAILURES = {
    "unknown command": (["nonsense"], 2, ["nonsense"]),
    "unknown option": (["generate", "--nonsense"], 2, ["--nonsense"]),
    "missing argument": (["inspect"], 2, ["STORE"]),
    "surplus argument": (["verify", "{store}", "more"], 2, ["more"]),
    "option without its value": (["generate", "-p"], 2, ["-p"]),
    "missing prompt": (["generate", "{demo}"], 2, ["-p TEXT"]),
    "nonexistent model": (["generate", "{missing}", "-p", "x"], 1, ["{missing}"]),
    "no checkpoint": (["generate", "{foreign}", "-p", "x"], 1, ["{foreign}"]),
    "no tokenizer": (["generate", "{store}", "-p", "x"], 1, ["tokenizer"]),
    "truncated weights": (
        ["repack", "{truncated}", "{root}/new"],
        1,
        ["{truncated}/model.safetensors", "truncated"],
    ),
    "unknown model type": (["repack", "{unknown}", "{root}/new"], 1, ["nonesuch"]),
    "unknown model type, generate": (["generate", "{unknown}", "-p", "x"], 1, ["nonesuch"]),
    "dense model": (["repack", "{dense}", "{root}/new"], 1, ["llama", "no routed experts"]),
    "dense model, generate": (["generate", "{dense}", "-p", "x"], 1, ["no routed experts"]),
    "config not JSON": (["repack", "{not_json}", "{root}/new"], 1, ["{not_json}/config.json"]),
    "no config": (["repack", "{no_config}", "{root}/new"], 1, ["{no_config}", "config.json"]),
    "repack, no checkpoint": (["repack", "{foreign}", "{root}/new"], 1, ["{foreign}"]),
    "repack, nonexistent": (["repack", "{missing}", "{root}/new"], 1, ["{missing}"]),
    "repack over a store": (["repack", "{float}", "{store}"], 1, ["{store}", "--force"]),
    "repack into a checkpoint": (["repack", "{float}", "{quantized}"], 1, ["{quantized}"]),
    "repack into a foreign folder": (["repack", "{float}", "{foreign}"], 1, ["{foreign}"]),
    "force into a foreign folder": (
        ["repack", "{float}", "{foreign}", "--force"],
        1,
        ["{foreign}"],
    ),
    "repack into a file": (["repack", "{float}", "{float}/config.json"], 1, ["config.json"]),
    "repack below a file": (["repack", "{float}", "{float}/config.json/x"], 1, ["config.json"]),
    "repack a store": (["repack", "{store}", "{root}/new"], 1, ["{store}", "is a store"]),
    "bits 7": (["repack", "{float}", "{root}/new", "--bits", "7"], 2, ["bits", "7"]),
    "resident bits 9": (
        ["repack", "{float}", "{root}/new", "--resident-bits", "9"],
        2,
        ["resident bits", "9"],
    ),
    "group size 48": (
        ["repack", "{float}", "{root}/new", "--group-size", "48"],
        2,
        ["group size", "48"],
    ),
    "group size too wide": (
        ["repack", "{float}", "{root}/new", "--group-size", "128"],
        2,
        ["64", "128"],
    ),
    "bits of a quantized checkpoint": (
        ["repack", "{quantized}", "{root}/new", "--bits", "4"],
        2,
        ["already quantized"],
    ),
    "inspect a checkpoint": (["inspect", "{quantized}"], 1, ["{quantized}", "flashmoe repack"]),
    "inspect nothing": (["inspect", "{missing}"], 1, ["{missing}"]),
    "verify nothing": (["verify", "{missing}"], 1, ["{missing}"]),
    "bench of nothing": (["bench", "decode", "{missing}"], 1, ["{missing}"]),
    "bench without rounds": (["bench", "decode", "{demo}", "--rounds", "0"], 2, ["--rounds"]),
    "bench kernels without rounds": (["bench", "kernels", "--rounds", "0"], 2, ["--rounds"]),
    "bench kernels, bits": (["bench", "kernels", "--bits", "7"], 2, ["bits", "7"]),
    "bench kernels, group": (["bench", "kernels", "--group-size", "0"], 2, ["group size", "0"]),
    "bench kernels, mode": (["bench", "kernels", "--mode", "mx"], 2, ["mode 'mx'"]),
    "bench kernels, pair": (["bench", "kernels", "--mode", "mxfp4", "--bits", "8"], 2, ["mxfp4"]),
    "bench kernels, isa": (["bench", "kernels", "--isa", "sse9"], 2, ["sse9"]),
    "bench without a command": (["bench"], 2, ["command"]),
    "chat with nothing": (["chat", "{missing}"], 1, ["{missing}"]),
    "chat, top-p": (["chat", "{demo}", "--top-p", "2"], 2, ["top-p", "2"]),
    "chat, no new tokens": (["chat", "{demo}", "--max-tokens", "0"], 2, ["0"]),
}

# Options that `flashmoe generate {demo} -p "What is a barn?"` is given.
BAD_OPTIONS = {
    "memory that is no size": ("--memory banana", 2, "banana"),
    "cache that is no size": ("--cache 12XB", 2, "12XB"),
    "cache of nothing": ("--cache 0", 2, "0"),
    "cache of many digits": (f"--cache {'9' * 400}GB", 2, "size"),
    "too little cache": ("--cache 1kB --kernel reference", 1, "the least that works is 1106kB"),
    "unknown kernel": ("--kernel nonsense", 2, "nonsense"),
    "unknown reader": ("--reader nonsense", 2, "nonsense"),
    "maps without the page cache": ("--reader mmap --no-page-cache", 2, "mmap"),
    "negative temperature": ("--temp -1", 2, "-1"),
    "temperature that is no number": ("--temp nan --max-tokens 1", 2, "nan"),
    "infinite temperature": ("--temp inf --max-tokens 1", 2, "inf"),
    "temperature that is a word": ("--temp hot", 2, "--temp"),
    "top-p above 1": ("--top-p 2", 2, "2"),
    "top-p 0": ("--top-p 0", 2, "0"),
    "negative top-k": ("--top-k -1", 2, "-1"),
    "min-p above 1": ("--min-p 2", 2, "2"),
    "negative seed": ("--seed -1", 2, "seed"),
    "seed of 65 bits": ("--seed 18446744073709551616", 2, "seed"),
    "no new tokens": ("--max-tokens 0", 2, "0"),
    "fraction of a token": ("--max-tokens 1.5", 2, "--max-tokens"),
    "no context": ("--context 0", 2, "0"),
    "context beyond the model": ("--context 2049", 2, "2048"),
    "prompt longer than the context": ("--context 15", 1, "16 tokens"),
    "system prompt without a template": ("--no-template --system x", 1, "template"),
}
BAD_WITHOUT_A_MODEL = (
    "--kernel nonsense",
    "--reader nonsense",
    "--reader mmap --no-page-cache",
    "--memory banana",
    "--memory min",
    "--cache 12XB",
    "--max-tokens 0",
    "--context 0",
    "--temp -1",
    "--seed -1",
)


@pytest.mark.parametrize("case", FAILURES)
def test_failure_is_one_line(case: str, run_cli: Run, places: dict[str, Path]) -> None:
    arguments, code, parts = FAILURES[case]
    result = run_cli(*(argument.format_map(places) for argument in arguments))
    assert_one_line(result, code, *(part.format_map(places) for part in parts))
    assert not (places["root"] / "new").exists()


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option_is_one_line(case: str, run_cli: Run, demo_store: Path) -> None:
    arguments, code, part = BAD_OPTIONS[case]
    result = run_cli("generate", demo_store, "-p", BARN, *arguments.split())
    assert_one_line(result, code, part)


@pytest.mark.parametrize("arguments", BAD_WITHOUT_A_MODEL)
def test_bad_option_fails_before_a_checkpoint_is_repacked(
    arguments: str, run_cli: Run, home: Path
) -> None:
    assert_one_line(run_cli("generate", "-p", "x", *arguments.split()), 2)
    assert list(home.rglob(MANIFEST_NAME)) == []


@pytest.mark.parametrize("template", ["--no-template", "--stats"])
def test_empty_prompt_is_refused(template: str, run_cli: Run, demo_store: Path) -> None:
    result = run_cli("generate", demo_store, "-p", "", template)
    assert_one_line(result, 1, "the prompt is empty")


def test_json_failure_is_one_line_too(run_cli: Run, demo_store: Path) -> None:
    result = run_cli("generate", demo_store, "-p", "x", "--json", "--context", "1")
    assert_one_line(result, 1, "context")


def test_prompt_that_is_no_text_is_refused(run_cli: Run, demo_store: Path) -> None:
    result = run_cli("generate", demo_store, "-p", "-", stdin=b"caf\xe9")
    assert_one_line(result, 1, "UTF-8")


def test_prompt_argument_that_is_no_text_is_refused(run_cli: Run, demo_store: Path) -> None:
    # What Python makes of the bytes caf\xe9 in an argument.
    assert_one_line(run_cli("generate", demo_store, "-p", "caf\udce9"), 1, "UTF-8")


def test_hub_failure_is_one_line(run_cli: Run, hub: Hub) -> None:
    hub.reachable = False
    result = run_cli("generate", "owner/name", "-p", "x")
    assert_one_line(result, 1, "owner/name cannot be fetched from the Hub")


def test_hub_model_is_not_fetched_for_a_destination_in_use(
    run_cli: Run, places: dict[str, Path], hub: Hub
) -> None:
    assert_one_line(run_cli("repack", "owner/name", places["store"]), 1, "--force")
    assert hub.requests == []


def test_home_that_cannot_be_written_is_one_line(
    run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", os.devnull)
    assert_one_line(run_cli("generate", "-p", "x"), 1, f"{os.devnull}/.cache/flashmoe")


def test_interrupt_is_one_line(
    run_cli: Run, demo_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "flashmoe.engine.build.select_kernel", lambda *_: signal.raise_signal(signal.SIGINT)
    )
    assert_one_line(run_cli("generate", demo_store, "-p", "x"), 130, "interrupted")
