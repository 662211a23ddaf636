"""A model of full size: its plan, and the proof's own small version."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashmoe import plan_run
from flashmoe.repacking.part_sizes import PlannedSizes
from flashmoe.repacking.repack import dry_run
from tests.support.families import FAMILIES
from tests.support.synthetic import sparse
from tests.support.synthetic.checkpoint import find_config, write_checkpoint

SCRIPT = Path(__file__).parents[2] / "scripts" / "scale_proof.py"
RECORD_BYTES = 7_077_888
N_RECORDS = 60 * 512
# 4-bit codes, a bfloat16 scale and bias per 64.
PROJECTION_BYTES = N_RECORDS * 1024 * 4096 * 9 // 16
PARTS = {
    "gate": PROJECTION_BYTES,
    "up": PROJECTION_BYTES,
    "down": PROJECTION_BYTES,
    "attention": 3_875_187_840,
    "embeddings": 248_320 * 4096 * 9 // 16,
    "head": 248_320 * 4096 * 9 // 16,
    # Routers, shared experts, norms.
    "resident": 559_619_072,
}


def planned(folder: Path, *, published: bool) -> PlannedSizes:
    """The plan of Qwen3.5-397B-A17B from weight files that are headers and holes."""
    config = find_config("qwen3.5-397b-a17b")
    plan = sparse.plan_sparse(config, bits=16 if published else None)
    if published:
        plan = sparse.as_published(plan)
        # The published files have 806.7 GB, 0.9 of them for seeing.
        assert plan.nbytes == 805_883_842_688
    holes = tuple(sparse.Hole(tensor.spec) for tensor in plan.tensors)
    write_checkpoint(replace(plan, tensors=holes), folder)
    return dry_run(folder)


@pytest.mark.parametrize("published", [False, True], ids=["4-bit", "published"])
def test_the_plan_of_the_real_model(published: bool, tmp_path: Path) -> None:
    sizes = planned(tmp_path / "source", published=published)
    assert sizes.streamed_bytes == N_RECORDS * RECORD_BYTES == 217_432_719_360
    assert sizes.token_bytes == 60 * 10 * RECORD_BYTES
    assert {part.part: part.bytes for part in sizes.parts} == PARTS
    # Records have no padding; a header of 16 KiB per file of a layer.
    assert sizes.streamed_bytes == 3 * PROJECTION_BYTES
    assert sizes.resident_bytes == sum(PARTS.values()) - sizes.streamed_bytes == 5_579_065_472
    assert sizes.file_bytes == sum(PARTS.values()) + 60 * 16_384 == 223_012_767_872


def test_the_run_of_the_real_model_is_planned_from_headers(tmp_path: Path) -> None:
    """What a 48 GB machine would hold of 209 GB, from a checkpoint that has no weights."""
    planned(tmp_path / "source", published=False)
    plan = plan_run(tmp_path / "source", memory="40GB", context=8192, tuned=False)
    assert plan.fits and plan.facts.streamed_bytes == N_RECORDS * RECORD_BYTES
    assert [plan.facts.layers[0].top_k, len(plan.facts.units)] == [10, 60]
    # A bank of 130 to 140 of 512 experts; with their scales widened for the reference, fewer.
    assert 60 < min(plan.memory.slots) <= max(plan.memory.slots) < 150
    assert 0.95 * 40e9 < plan.memory.planned_bytes <= 40e9
    assert not plan.page_cache
    assert 10e9 < plan.memory.least_total_bytes < 14e9
    assert not plan_run(tmp_path / "source", memory="8GB", context=8192, tuned=False).fits


@pytest.mark.parametrize("published", [False, True], ids=["4-bit", "published"])
def test_the_proof_in_small(
    published: bool,
    tmp_path: Path,
) -> None:
    config = FAMILIES["qwen3_5_moe"]
    sizes = {"moe_intermediate_size": 128, "hidden_size": 128, "num_experts": 64}
    text = {**config["text_config"], **sizes}
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": text}))
    folder = tmp_path / "proof"
    command = [sys.executable, SCRIPT, folder, "--model", tmp_path / "config.json", "--json"]
    command += ["--memory", "1GB", "--large-bytes", "8192"]
    command += ["--published"] if published else []

    def prove() -> dict[str, Any]:
        line = [*map(str, command)]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    reports = prove()
    assert list(reports) == ["source", "plan", "repack", "inspect", "decode", "records", "verify"]
    assert reports["inspect"]["records"] == 3 * 64
    assert reports["plan"]["streamed_bytes"] == reports["inspect"]["streamed_bytes"]
    assert reports["repack"]["disk_bytes"] < 0.9 * reports["repack"]["apparent_bytes"]
    compared = reports["records"]
    assert compared["records_compared"] == 3 * (2 if published else 64)
    assert compared["records_different"] == 0
    decoded = reports["decode"]
    assert decoded["finite"]
    assert decoded["same_greedy_tokens"] == decoded["compared_steps"] == 5
    assert decoded["difference"] < 1e-5 < 0.01 < decoded["difference_without_experts"]
    # Nothing is done again.
    assert prove() == json.loads((folder / "stages.json").read_text()) == reports
