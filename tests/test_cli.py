"""Every command: its help, what it prints, its JSON, and one line for each expected failure."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import families
import pytest
from conftest import FLASHMOE, Result
from mlx_lm.utils import save_config, save_model

from flashmoe import repack
from flashmoe.bench.decode import DecodeResult
from flashmoe.cli.console import AnswerReport
from flashmoe.cli.main import app
from flashmoe.demo import DEMO_FOLDER
from flashmoe.store.inspect import StoreSummary
from flashmoe.store.manifest import MANIFEST_NAME
from flashmoe.store.reader import open_store
from flashmoe.units import format_size

Run = Callable[..., Result]

COMMANDS = [command.callback.__name__ for command in app.registered_commands]
GROUPS = {group.name: group.typer_instance for group in app.registered_groups}
SUBCOMMANDS = [
    f"{name} {command.callback.__name__}"
    for name, group in GROUPS.items()
    for command in group.registered_commands
]
CAPITAL = "What is the capital of the United States?"
WASHINGTON = [57, 317, 442, 2226, 16]
PLACES = ("quantized", "float", "dense", "truncated", "unknown", "not_json", "no_config", "empty")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 128,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def places(demo_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What commands may be pointed at, good and bad, by the name that cases call it."""
    root = tmp_path_factory.mktemp("places")
    names = [
        "quantized",
        "float",
        "dense",
        "truncated",
        "unknown",
        "not_json",
        "no_config",
        "empty",
    ]
    found = {name: root / name for name in names}
    for folder in found.values():
        folder.mkdir()
    families.save_checkpoint(found["quantized"], "mixtral")
    families.save_checkpoint(found["float"], "mixtral", bits=None)
    save_model(found["dense"], families.build_model(LLAMA, seed=0))
    save_config(dict(LLAMA), found["dense"] / "config.json")
    for name in ("truncated", "unknown", "not_json", "no_config"):
        shutil.copytree(found["quantized"], found[name], dirs_exist_ok=True)
    weights = found["truncated"] / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    config = json.loads((found["quantized"] / "config.json").read_text())
    (found["unknown"] / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    (found["not_json"] / "config.json").write_text("{oops")
    (found["no_config"] / "config.json").unlink()
    (found["empty"] / "notes.md").write_text("mine")
    found["store"] = repack(found["quantized"], root / "tiny.flashmoe").path
    return {**found, "demo": demo_store, "missing": root / "missing", "root": root}


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    """The command failed with this code and one line on stderr that says all of `parts`."""
    assert (result.code, result.out) == (code, "")
    assert re.fullmatch(r"flashmoe: [^\n]+\n", result.err), result.err
    for part in parts:
        assert part in result.err


# Help and version


@pytest.mark.parametrize("command", ["", *COMMANDS, *GROUPS, *SUBCOMMANDS])
def test_help_answers_in_half_a_second(command: str, home: Path) -> None:
    line = [str(FLASHMOE), *command.split(), "--help"]
    env = {**os.environ, "HOME": str(home)}
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(line, env=env, capture_output=True, text=True, check=True)
        taken.append(time.perf_counter() - started)
        assert done.stderr == ""
        assert done.stdout.startswith(f"Usage: flashmoe {command or '[OPTIONS]'}")
        if taken[-1] < 0.5:
            break
    assert min(taken) < 0.5, f"{' '.join(line[1:])} took {taken} seconds"


def test_flashmoe_alone_prints_help(run_cli: Run) -> None:
    result = run_cli()
    assert (result.code, result.err) == (0, "")
    assert result.out == run_cli("--help").out == run_cli("-h").out
    for command in (*COMMANDS, *GROUPS):
        assert f"\n  {command} " in result.out


def test_version(run_cli: Run) -> None:
    assert run_cli("--version") == Result(0, f"flashmoe {version('flashmoe')}\n", "")


# Expected failures


FAILURES = {
    "unknown command": (["nonsense"], 2, ["nonsense"]),
    "unknown option": (["generate", "--nonsense"], 2, ["--nonsense"]),
    "missing argument": (["inspect"], 2, ["STORE"]),
    "surplus argument": (["verify", "{store}", "more"], 2, ["more"]),
    "option without its value": (["generate", "-p"], 2, ["-p"]),
    "missing prompt": (["generate", "{demo}"], 2, ["-p TEXT"]),
    "nonexistent model": (["generate", "{missing}", "-p", "x"], 1, ["{missing}"]),
    "no checkpoint": (["generate", "{empty}", "-p", "x"], 1, ["{empty}"]),
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
    "repack, no checkpoint": (["repack", "{empty}", "{root}/new"], 1, ["{empty}"]),
    "repack, nonexistent": (["repack", "{missing}", "{root}/new"], 1, ["{missing}"]),
    "repack over a store": (["repack", "{float}", "{store}"], 1, ["{store}", "--force"]),
    "repack into a checkpoint": (["repack", "{float}", "{quantized}"], 1, ["{quantized}"]),
    "repack into a foreign folder": (["repack", "{float}", "{empty}"], 1, ["{empty}"]),
    "force into a foreign folder": (["repack", "{float}", "{empty}", "--force"], 1, ["{empty}"]),
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
    "bench without a command": (["bench"], 2, ["command"]),
    "chat with nothing": (["chat", "{missing}"], 1, ["{missing}"]),
    "chat, top-p": (["chat", "{demo}", "--top-p", "2"], 2, ["top-p", "2"]),
    "chat, no new tokens": (["chat", "{demo}", "--max-tokens", "0"], 2, ["0"]),
}

# Appended to: flashmoe generate {demo} -p "What is a barn?"
BAD_OPTIONS = {
    "memory that is no size": ("--memory banana", 2, "banana"),
    "cache that is no size": ("--cache 12XB", 2, "12XB"),
    "cache of nothing": ("--cache 0", 2, "0"),
    "cache of many digits": (f"--cache {'9' * 400}GB", 2, "size"),
    "too little cache": ("--cache 1kB", 1, "the least that works is 1106kB"),
    "unknown kernel": ("--kernel nonsense", 2, "nonsense"),
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
    "--memory banana",
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
    result = run_cli("generate", demo_store, "-p", "What is a barn?", *arguments.split())
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


def test_hub_failure_is_one_line(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host\nand a second line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    result = run_cli("generate", "owner/name", "-p", "x")
    assert_one_line(result, 1, "owner/name", "Hub", "no route to host")


def test_hub_model_is_not_fetched_for_a_destination_in_use(
    run_cli: Run, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[object] = []

    def fetch(source: object, **_: object) -> str:
        fetched.append(source)
        return str(places["float"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert_one_line(run_cli("repack", "owner/name", places["store"]), 1, "--force")
    assert fetched == []


def test_home_that_cannot_be_written_is_one_line(
    run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", os.devnull)
    assert_one_line(run_cli("generate", "-p", "x"), 1, f"{os.devnull}/.cache/flashmoe")


# The same in processes of their own, for what only shows there


def test_process_unknown_command(run_process: Run) -> None:
    assert_one_line(run_process("nonsense"), 2, "nonsense")


def test_process_hub_id_offline(run_process: Run) -> None:
    result = run_process("generate", "owner/name", "-p", "x", env={"HF_HUB_OFFLINE": "1"})
    assert_one_line(result, 1, "owner/name")


def test_process_too_little_memory_names_the_least(run_process: Run, demo_store: Path) -> None:
    ask = ("generate", demo_store, "-p", CAPITAL, "--memory")
    refused = run_process(*ask, "60MB")
    assert_one_line(refused, 1, "60.0 MB")
    least = re.search(r"the least that fits is (\d+[kMG]?B)$", refused.err.strip())
    assert least is not None, refused.err
    assert run_process(*ask, least[1]) == Result(0, "Washington.\n", "")


def test_process_whose_reader_leaves_is_silent(home: Path, places: dict[str, Path]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [str(FLASHMOE), "inspect", str(places["store"])],
            stdout=writer,
            stderr=subprocess.PIPE,
            env={**os.environ, "HOME": str(home)},
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_process_with_another_encoding(
    encoding: str, run_process: Run, places: dict[str, Path]
) -> None:
    result = run_process("inspect", places["store"], env={"PYTHONIOENCODING": encoding})
    assert (result.code, result.err) == (0, "")
    assert "mixtral, 350K parameters" in result.out


# Damaged stores


def remove_manifest(store: Path) -> None:
    (store / MANIFEST_NAME).unlink()


def break_manifest(store: Path) -> None:
    (store / MANIFEST_NAME).write_text("{oops")


def raise_version(store: Path) -> None:
    manifest = json.loads((store / MANIFEST_NAME).read_text())
    (store / MANIFEST_NAME).write_text(json.dumps({**manifest, "version": 2}))


def remove_layer(store: Path) -> None:
    (store / "experts/layer-001.safetensors").unlink()


def shorten_layer(store: Path) -> None:
    layer = store / "experts/layer-001.safetensors"
    os.truncate(layer, layer.stat().st_size - 1)


def break_layer_header(store: Path) -> None:
    overwrite(store / "experts/layer-001.safetensors", 20, b"?")


def remove_resident(store: Path) -> None:
    next(store.glob("resident-*")).unlink()


def remove_config(store: Path) -> None:
    (store / "config.json").unlink()


def overwrite(path: Path, offset: int, content: bytes) -> None:
    """Write into a copy that takes the file's place, since the tests' stores share files."""
    changed = bytearray(path.read_bytes())
    changed[offset : offset + len(content)] = content
    path.unlink()
    path.write_bytes(changed)


DAMAGES = {
    remove_manifest: f"no {MANIFEST_NAME}",
    break_manifest: MANIFEST_NAME,
    raise_version: "version 2",
    remove_layer: "experts/layer-001.safetensors",
    shorten_layer: "experts/layer-001.safetensors",
    break_layer_header: "offset 20",
    remove_resident: "resident-00001-of-00001.safetensors",
    remove_config: "config.json is missing",
}


@pytest.fixture
def damaged(tmp_path: Path, places: dict[str, Path]) -> Path:
    """A copy of the tiny store, for the test to damage."""
    return Path(shutil.copytree(places["store"], tmp_path / "damaged"))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_store_is_one_line(
    damage: Callable[[Path], None], damaged: Path, run_cli: Run
) -> None:
    damage(damaged)
    for command in ("inspect", "verify"):
        assert_one_line(run_cli(command, damaged), 1, str(damaged), DAMAGES[damage])
    assert_one_line(run_cli("generate", damaged, "-p", "x"), 1, str(damaged))


def test_verify_names_the_damaged_tensor(damaged: Path, run_cli: Run) -> None:
    layout = open_store(damaged).manifest.layers[1].layout
    component = layout.record.components[1]
    offset = layout.record_offset(5) + component.offset
    overwrite(damaged / layout.file, offset + 3, b"\x5a\xa5")
    result = run_cli("verify", damaged, "--json")
    where = f"expert 5 {component.name} at offset {offset}"
    assert_one_line(result, 1, layout.file, layout.path, where)


def test_verify_names_the_damaged_resident_tensor(damaged: Path, run_cli: Run) -> None:
    shard = open_store(damaged).manifest.resident[0]
    overwrite(damaged / shard.file, len(shard.header) + 1, b"\x5a\xa5")
    result = run_cli("verify", damaged)
    where = f"{shard.tensors[0].name} at offset {len(shard.header)}"
    assert_one_line(result, 1, shard.file, where)


def test_store_whose_config_is_not_json_is_one_line(damaged: Path, run_cli: Run) -> None:
    (damaged / "config.json").write_text("{oops")
    assert_one_line(run_cli("generate", damaged, "-p", "x"), 1, "config.json")
    assert_one_line(run_cli("verify", damaged), 1, "config.json", "SHA-256")


# What repack, inspect and verify print


def tensor_bytes(path: Path) -> int:
    """Bytes of a safetensors file that are not its header."""
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    return path.stat().st_size - 8 - header_bytes


def test_inspect_bytes_are_those_on_disk(run_cli: Run, demo_store: Path) -> None:
    summary = run_cli("inspect", demo_store, "--json").json()
    layers = sorted(demo_store.glob("experts/*"))
    assert summary["streamed_bytes"] == sum(map(tensor_bytes, layers))
    assert summary["resident_bytes"] == sum(map(tensor_bytes, demo_store.glob("resident-*")))
    assert summary["records"] == sum(layer["experts"] for layer in summary["layers"]) == 192
    for layer, path in zip(summary["layers"], layers, strict=True):
        assert layer["experts"] * layer["record_bytes"] == tensor_bytes(path)
    routed = (layer["top_k"] * layer["record_bytes"] for layer in summary["layers"])
    assert summary["token_bytes"] == sum(routed)


def test_inspect_json_keys(run_cli: Run, demo_store: Path) -> None:
    summary = run_cli("inspect", demo_store, "--json").json()
    assert list(summary) == [field.name for field in fields(StoreSummary)]
    assert summary["path"] == str(demo_store)
    assert summary["model_type"] == "qwen3_moe"
    assert summary["source"]["repo"] == "demo"
    assert summary["resident_packing"] == {"8-bit affine/64": 31}
    assert summary["layers"][5] == {
        "path": "model.layers.5.mlp.switch_mlp",
        "experts": 32,
        "top_k": 2,
        "record_bytes": 98304,
        "padding_bytes": 98304 - 82944,
        "packing": dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "4-bit affine/64"),
    }


def test_inspect_text(run_cli: Run, demo_store: Path) -> None:
    result = run_cli("inspect", demo_store)
    assert (result.code, result.err) == (0, "")
    summary = run_cli("inspect", demo_store, "--json").json()
    head, *rows = result.out.splitlines()
    assert head == f"{demo_store}  qwen3_moe, 30.6M parameters, 6 MoE layers"
    assert rows[:4] == [
        "  source     demo",
        f"  resident   {format_size(summary['resident_bytes'])}  (31 × 8-bit affine/64)",
        f"  streamed   {format_size(summary['streamed_bytes'])} in 192 records",
        f"  per token  {format_size(summary['token_bytes'])} of records",
    ]
    assert result.out.count("98.3 kB") == result.out.count("15.6%") == 6


def test_inspect_names_layers_in_full(run_cli: Run, demo_store: Path) -> None:
    table = run_cli("inspect", demo_store).out
    assert [f"model.layers.{i}.mlp.switch_mlp" in table for i in range(6)] == [True] * 6


def test_repack_text(run_cli: Run, places: dict[str, Path], tmp_path: Path) -> None:
    dest = tmp_path / "new.flashmoe"
    result = run_cli("repack", places["float"], dest)
    assert (result.code, result.err) == (0, "")
    summary = run_cli("inspect", dest, "--json").json()
    head, line = result.out.splitlines()
    assert head == f"{dest}  mixtral, 350K parameters, 3 MoE layers"
    size = format_size(summary["resident_bytes"] + summary["streamed_bytes"])
    assert re.fullmatch(rf"{size} in \d+\.\d\d s; run it with: flashmoe chat {dest}", line), line


def test_repack_json_is_inspect_and_seconds(
    run_cli: Run, places: dict[str, Path], tmp_path: Path
) -> None:
    dest = tmp_path / "new.flashmoe"
    options = ("--bits", "8", "--group-size", "32", "--resident-bits", "16", "--json")
    report = run_cli("repack", places["float"], dest, *options).json()
    assert 0 < report.pop("seconds") < 60
    assert report == run_cli("inspect", dest, "--json").json()
    assert report["resident_packing"] == {}
    assert set(report["layers"][0]["packing"].values()) == {"8-bit affine/32"}


def test_repack_names_the_store_after_its_source(
    run_cli: Run, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli("repack", places["quantized"], "--json").json()["path"] == "quantized.flashmoe"
    assert open_store(tmp_path / "quantized.flashmoe").manifest.model_type == "mixtral"


def test_repack_force_replaces_a_store(
    run_cli: Run, places: dict[str, Path], damaged: Path
) -> None:
    report = run_cli("repack", places["float"], damaged, "--force", "--bits", "8", "--json").json()
    assert set(report["layers"][0]["packing"].values()) == {"8-bit affine/64"}
    assert run_cli("verify", damaged, "--json").json()["ok"] is True


def test_verify(run_cli: Run, demo_store: Path) -> None:
    files = [path for path in demo_store.rglob("*") if path.is_file()]
    checked = [path for path in files if path.name != MANIFEST_NAME]
    size = sum(path.stat().st_size for path in checked)
    report = run_cli("verify", demo_store, "--json").json()
    assert 0 < report.pop("seconds") < 60
    assert report == {"ok": True, "files": len(checked), "bytes": size}
    result = run_cli("verify", demo_store)
    assert (result.code, result.err) == (0, "")
    good = f"{demo_store} is good: {len(checked)} files, {format_size(size)}, "
    assert result.out.startswith(good)
    assert re.fullmatch(r"[\d.]+ [kMGT]B/s\n", result.out.removeprefix(good))


def test_brackets_in_a_path_are_no_markup(
    run_cli: Run, places: dict[str, Path], tmp_path: Path
) -> None:
    # The slash makes a closing tag of two folder names.
    source = tmp_path / "checkpoint[/red]"
    source.parent.mkdir()
    source.symlink_to(places["quantized"])
    dest = tmp_path / "[bold]store"
    results = [run_cli("repack", source, dest), run_cli("inspect", dest), run_cli("verify", dest)]
    for result in results:
        assert (result.code, result.err) == (0, "")
        assert str(dest) in result.out


# generate


def ask(run_cli: Run, *arguments: object, stdin: bytes = b"") -> dict[str, Any]:
    """The JSON of an answer."""
    answer: dict[str, Any] = run_cli("generate", *arguments, "--json", stdin=stdin).json()
    return answer


def test_generate_text_and_stats(run_cli: Run, demo_store: Path) -> None:
    result = run_cli("generate", demo_store, "-p", CAPITAL, "--cache", "2MB", "--stats")
    assert (result.code, result.err) == (0, "")
    answer, line, details = result.out.splitlines()
    assert answer == "Washington."
    parts = re.fullmatch(
        r"6 tokens · [\d.]+ tok/s · first token [\d.]+ s · hit rate (\d+)% · "
        r"(\d+) kB read/token · bank 1\.94 MB · peak memory [\d.]+ MB",
        line,
    )
    assert parts is not None, line
    assert int(parts[1]) < 50
    assert int(parts[2]) > 100
    counts = re.fullmatch(
        r"19 prompt tokens · \d+ hits · (\d+) misses · ([\d.]+) MB read of [\d.]+ MB demanded",
        details,
    )
    assert counts is not None, details
    assert int(counts[1]) > 0
    assert float(counts[2]) > 0


def test_generate_prints_no_stats_unasked(run_cli: Run, demo_store: Path) -> None:
    result = run_cli("generate", demo_store, "--prompt", CAPITAL, "--cache", "min")
    assert result == Result(0, "Washington.\n", "")


def test_generate_json(run_cli: Run, demo_store: Path) -> None:
    small = ask(run_cli, demo_store, "-p", CAPITAL, "--cache", "2MB")
    assert list(small) == ["text", "tokens", "finish_reason", "stats"]
    assert small["text"] == "Washington."
    assert small["tokens"] == WASHINGTON
    assert small["finish_reason"] == "stop"
    stats = small["stats"]
    assert list(stats) == [field.name for field in fields(AnswerReport)]
    assert (stats["prompt_tokens"], stats["tokens"]) == (19, 6)
    assert stats["misses"] > 0
    record_bytes = open_store(demo_store).manifest.layers[0].layout.record.stride
    assert stats["bytes_read"] == stats["misses"] * record_bytes
    assert stats["hit_rate"] == stats["hits"] / (stats["hits"] + stats["misses"])
    assert stats["bytes_read_per_token"] == stats["bytes_read"] / (19 + 6 - 1)
    assert 0 < stats["bank_bytes"] <= 2_000_000
    assert stats["peak_memory_bytes"] > stats["bank_bytes"]
    assert stats["tokens_per_second"] > 0
    assert stats["seconds_to_first_token"] > 0


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
    assert ask(run_cli, demo_store, "-p", "-", stdin=CAPITAL.encode())["tokens"] == WASHINGTON


def test_process_reads_a_line_from_stdin(run_process: Run, demo_store: Path) -> None:
    # The newline is echo's, not part of the question.
    asked = ("generate", demo_store, "-p", "-", "--cache", "2MB")
    assert run_process(*asked, stdin=f"{CAPITAL}\n".encode()) == Result(0, "Washington.\n", "")


def test_seed_makes_sampling_repeatable(run_cli: Run, demo_store: Path) -> None:
    def tokens(seed: int) -> list[int]:
        drawn = ("--temp", "1.5", "--max-tokens", "12", "--seed", seed)
        found: list[int] = ask(run_cli, demo_store, "-p", "What is a barn?", *drawn)["tokens"]
        return found

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_sampling_without_a_seed_varies(run_cli: Run, demo_store: Path) -> None:
    drawn = ("--temp", "5", "--max-tokens", "12")
    answers = [ask(run_cli, demo_store, "-p", "Once", *drawn)["tokens"] for _ in range(2)]
    assert answers[0] != answers[1]


def test_max_tokens_ends_an_answer(run_cli: Run, demo_store: Path) -> None:
    answer = ask(run_cli, demo_store, "-p", CAPITAL, "--max-tokens", "2")
    assert answer["tokens"] == WASHINGTON[:2]
    assert answer["finish_reason"] == "length"
    assert answer["stats"]["tokens"] == 2


def test_context_ends_an_answer(run_cli: Run, demo_store: Path) -> None:
    # 19 tokens of prompt and 2 that are fed; the third is sampled and never fed.
    answer = ask(run_cli, demo_store, "-p", CAPITAL, "--context", "21")
    assert answer["tokens"] == WASHINGTON[:3]
    assert answer["finish_reason"] == "length"


def test_no_template_feeds_the_text_as_it_is(run_cli: Run, demo_store: Path) -> None:
    rendered = f"<|im_start|>user\n{CAPITAL}<|im_end|>\n<|im_start|>assistant\n"
    bare = ask(run_cli, demo_store, "-p", CAPITAL, "--no-template")
    assert bare["stats"]["prompt_tokens"] < 19
    same = ask(run_cli, demo_store, "-p", rendered, "--no-template")
    assert same["stats"]["prompt_tokens"] == 19
    assert same["tokens"] == WASHINGTON


def test_system_prompt_goes_first(run_cli: Run, demo_store: Path) -> None:
    rendered = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    rendered += "<|im_start|>assistant\n"
    told = ask(run_cli, demo_store, "-p", "Hello", "--system", "Be brief.")
    same = ask(run_cli, demo_store, "-p", rendered, "--no-template")
    assert told["tokens"] == same["tokens"]
    assert told["stats"]["prompt_tokens"] == same["stats"]["prompt_tokens"] > 11


# bench


def test_bench_decode_json(run_cli: Run, demo_store: Path) -> None:
    brief = ("--rounds", "1", "--max-tokens", "2")
    results = run_cli("bench", "decode", demo_store, *brief, "--json").json()
    assert [result["name"] for result in results] == ["min", "half", "full"]
    for result in results:
        assert list(result) == [field.name for field in fields(DecodeResult)]
        assert 0 < result["slowest"] <= result["tokens_per_second"] <= result["fastest"]
        assert result["ratio"] is None
    rates = [result["hit_rate"] for result in results]
    assert rates == sorted(rates)
    assert rates[-1] == 1.0
    assert results[-1]["bytes_read_per_token"] == 0


# First use of a checkpoint


def test_first_use_repacks_and_the_second_does_not(run_cli: Run, home: Path) -> None:
    first = ask(run_cli, "-p", CAPITAL)
    stores = list((home / ".cache/flashmoe").iterdir())
    assert len(stores) == 1
    manifest = stores[0] / MANIFEST_NAME
    written = manifest.stat().st_mtime_ns
    assert ask(run_cli, DEMO_FOLDER, "-p", CAPITAL)["tokens"] == first["tokens"] == WASHINGTON
    assert list((home / ".cache/flashmoe").iterdir()) == stores
    assert manifest.stat().st_mtime_ns == written
    assert run_cli("verify", stores[0], "--json").json()["ok"] is True


def test_interrupt_is_one_line(
    run_cli: Run, demo_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "flashmoe.engine.select_kernel", lambda name: signal.raise_signal(signal.SIGINT)
    )
    assert_one_line(run_cli("generate", demo_store, "-p", "x"), 130, "interrupted")


def test_process_interrupted_while_answering(home: Path, demo_store: Path) -> None:
    endless = ["--no-template", "--temp", "10", "--seed", "1", "--max-tokens", "2000"]
    with subprocess.Popen(
        [str(FLASHMOE), "generate", str(demo_store), "-p", "Once", *endless],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "HOME": str(home)},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.decode().strip() == "flashmoe: interrupted"


def test_command_is_installed() -> None:
    assert FLASHMOE.is_file(), f"{sys.executable} has no flashmoe beside it"
