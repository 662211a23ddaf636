"""Which format a checkpoint is in, and what is said of one that nobody reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flashmoe import SourceError, repack
from flashmoe.repacking.formats.select import FORMATS as KNOWN
from flashmoe.repacking.repack import dry_run
from tests.support.checkpoints import GOLDEN, edit_config, file_tensors
from tests.support.commands import Run, assert_one_line
from tests.support.families import save_checkpoint
from tests.support.format_cases import FORMATS, presentation_of, save_tensors
from tests.support.hub import Hub
from tests.support.refusals import refused

WORDS = tuple(known.words for known in KNOWN)


@pytest.fixture
def packed(source: Path) -> Path:
    return shutil.copytree(FORMATS / "fp8_qwen3_moe", source)


def edit(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "a method": ({"quantization_config": {"quant_method": "aqlm"}}, "aqlm"),
    "bitnet": ({"quantization_config": {"quant_method": "bitnet"}}, "bitnet"),
    "nested": ({"text_config": {"quantization_config": {"quant_method": "vptq"}}}, "vptq"),
    "another key": ({"compression_config": {"quant_method": "spqr"}}, "spqr"),
    "no method": ({"quantization_config": {"bits": 4}}, "does not say"),
    "no name": ({"quantization_config": {"quant_method": ["fp8"]}}, "['fp8']"),
    "no table": ({"text_config": "none", "compression_config": {"format": 1}}, "does not say"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_format_names_itself(packed: Path, dest: Path, case: str) -> None:
    entries, name = UNKNOWN[case]
    edit(packed, **entries)
    for attempt in (lambda: repack(packed, dest), lambda: dry_run(packed)):
        with refused(SourceError, str(packed), name, "floats", "MLX", *WORDS):
            attempt()
    assert not dest.exists()


def test_from_the_hub(hub: Hub, dest: Path) -> None:
    edit_config(hub.files, quantization_config={"quant_method": "aqlm"})
    with refused(SourceError, "owner/name", "aqlm", *WORDS):
        repack("owner/name", dest)
    assert not dest.exists()


def test_the_command_says_so(run_cli: Run, packed: Path, dest: Path) -> None:
    edit(packed, quantization_config={"quant_method": "aqlm"})
    for options in ([], ["--dry-run"]):
        result = run_cli("repack", str(packed), str(dest), *options)
        assert_one_line(result, 1, "aqlm", *WORDS)


@pytest.mark.parametrize("dtype,size_bytes", [("F8_E5M2", 1), ("F8_E4M3", 1), ("F64", 8)])
def test_a_dtype_that_nobody_reads(source: Path, dest: Path, dtype: str, size_bytes: int) -> None:
    shutil.copytree(GOLDEN / "qwen3_moe", source)
    tensors = file_tensors(source / "model.safetensors")
    name = "model.norm.weight"
    _, shape, _ = tensors[name]
    tensors[name] = (dtype, shape, bytes(size_bytes * shape[0]))
    save_tensors(source / "model.safetensors", tensors)
    with refused(SourceError, name, dtype, *WORDS):
        repack(source, dest, bits=32)
    assert not dest.exists()


def test_where_a_config_says_it(packed: Path) -> None:
    expected = set(presentation_of(packed).stand_ins)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for entries in (
        {"compression_config": settings},
        {"text_config": {"quantization_config": settings}},
    ):
        edit(packed, quantization_config=None, **entries)
        assert set(presentation_of(packed).stand_ins) == expected


def test_mxfp8_of_others_is_fp8(packed: Path) -> None:
    expected = set(presentation_of(packed).stand_ins)
    edit(packed, quantization_config={"quant_method": "mxfp8"})
    assert set(presentation_of(packed).stand_ins) == expected


def test_modelopt_says_it_in_a_file_of_its_own(packed: Path) -> None:
    edit(packed, quantization_config=None)
    table = {"quantization": {"quant_algo": "W4A8_AWQ"}}
    (packed / "hf_quant_config.json").write_text(json.dumps(table))
    with refused(SourceError, "modelopt", "W4A8_AWQ"):
        presentation_of(packed)


def test_what_mlx_packed_is_for_mlx_lm_to_read(source: Path) -> None:
    save_checkpoint(source, "qwen3_moe")
    config = json.loads((source / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert presentation_of(source).config == {}
