"""What `flashmoe repack`, `inspect` and `verify` print, as text and as JSON."""

import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

from flashmoe.base.units import format_size
from flashmoe.store.inspect import StoreSummary
from flashmoe.store.manifest import MANIFEST_NAME
from flashmoe.store.reader import open_store
from tests.support.commands import Run


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
    assert list(summary) == [*(field.name for field in fields(StoreSummary)), "tuned"]
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


def test_repack_text(run_cli: Run, places: dict[str, Path], dest: Path) -> None:
    result = run_cli("repack", places["float"], dest)
    assert (result.code, result.err) == (0, "")
    summary = run_cli("inspect", dest, "--json").json()
    head, line = result.out.splitlines()
    assert head == f"{dest}  mixtral, 350K parameters, 3 MoE layers"
    size = format_size(summary["resident_bytes"] + summary["streamed_bytes"])
    assert re.fullmatch(rf"{size} in \d+\.\d\d s; run it with: flashmoe chat {dest}", line), line


def test_repack_json_is_inspect_and_seconds(
    run_cli: Run, places: dict[str, Path], dest: Path
) -> None:
    options = ("--bits", "8", "--group-size", "32", "--resident-bits", "16", "--json")
    report = run_cli("repack", places["float"], dest, *options).json()
    assert 0 < report.pop("seconds") < 60
    assert {**report, "tuned": None} == run_cli("inspect", dest, "--json").json()
    assert report["resident_packing"] == {}
    assert set(report["layers"][0]["packing"].values()) == {"8-bit affine/32"}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--bits", "3", "--resident-bits", "8"),
        ("--recipe", "3-bit"),
        ("--recipe", "2-bit", "--method", "rtn"),
    ],
    ids=" ".join,
)
def test_dry_run_says_what_repack_writes(
    run_cli: Run, places: dict[str, Path], dest: Path, options: tuple[str, ...]
) -> None:
    planned = run_cli("repack", places["float"], dest, *options, "--dry-run", "--json").json()
    assert not dest.exists()
    written = run_cli("repack", places["float"], dest, *options, "--json").json()
    for name in ("model_type", "parameters", "resident_bytes", "streamed_bytes", "token_bytes"):
        assert planned[name] == written[name]
    parts = {part["part"]: part for part in planned["parts"]}
    assert {"gate", "up", "down", "attention", "embeddings", "head"} <= set(parts)
    experts = sum(parts[name]["bytes"] for name in ("gate", "up", "down"))
    padding = sum(x["padding_bytes"] * x["experts"] for x in written["layers"])
    assert experts == written["streamed_bytes"] - padding
    assert sum(part["bytes"] for part in parts.values()) - experts == written["resident_bytes"]
    packing = written["layers"][0]["packing"]
    for name in ("gate", "up", "down"):
        assert parts[name]["packing"] == {packing[f"{name}_proj"]: written["records"]}


def test_dry_run_text(run_cli: Run, places: dict[str, Path], dest: Path) -> None:
    result = run_cli("repack", places["float"], dest, "--dry-run")
    assert (result.code, result.err) == (0, "")
    assert not dest.exists()
    planned = run_cli("repack", places["float"], dest, "--dry-run", "--json").json()
    head, *_, total = result.out.splitlines()
    assert head == f"{places['float']}  mixtral, 350K parameters; nothing is written"
    for part in planned["parts"]:
        assert format_size(part["bytes"]) in result.out
    assert total.endswith(f"{format_size(planned['file_bytes'])} on disk")


def test_dry_run_of_a_quantized_checkpoint(
    run_cli: Run, places: dict[str, Path], dest: Path
) -> None:
    planned = run_cli("repack", places["quantized"], dest, "--dry-run", "--json").json()
    assert not dest.exists()
    written = run_cli("repack", places["quantized"], dest, "--json").json()
    assert planned["streamed_bytes"] == written["streamed_bytes"]
    assert "embeddings" in {part["part"] for part in planned["parts"]}


def test_repack_names_the_store_after_its_source(
    run_cli: Run, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli("repack", places["quantized"], "--json").json()["path"] == "quantized.flashmoe"
    assert open_store(tmp_path / "quantized.flashmoe").manifest.model_type == "mixtral"


def test_repack_force_replaces_a_store(run_cli: Run, places: dict[str, Path], dest: Path) -> None:
    shutil.copytree(places["store"], dest)
    report = run_cli("repack", places["float"], dest, "--force", "--bits", "8", "--json").json()
    assert set(report["layers"][0]["packing"].values()) == {"8-bit affine/64"}
    assert run_cli("verify", dest, "--json").json()["ok"] is True


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
