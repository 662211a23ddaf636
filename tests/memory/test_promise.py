"""The process stays under the number the user gave, as the operating system counts it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

import flashmoe
from flashmoe.store.reader import Store
from tests.support.families import FAMILIES
from tests.support.synthetic.checkpoint import plan_checkpoint, write_checkpoint

# 113 MB of experts a layer, beside 3 MB of everything else.
CONFIG = FAMILIES["qwen3_moe"] | {
    "head_dim": 64,
    "hidden_size": 512,
    "max_position_embeddings": 8192,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "num_attention_heads": 8,
    "num_experts": 256,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "vocab_size": 256,
}
CONTEXT = 1024
# A conversation of turns: a question's tokens, and tokens of the answer.
TURNS = [(300, 40), (90, 40), (200, 40)]
RUN = f"""
import json, sys
from flashmoe import FlashMoEModel, MemoryBudgetError, Sampling
from flashmoe.base import machine
from flashmoe.store.reader import open_store
try:
    model = FlashMoEModel(open_store(sys.argv[1]), memory=sys.argv[2], context={CONTEXT})
except MemoryBudgetError as error:
    print(json.dumps({{"least": error.least_bytes, "message": str(error)}}))
    sys.exit()
plan = model.memory_plan
session, ids, banks, ends = model.session(), [], [], []
for number, (asked, answered) in enumerate({TURNS}):
    ids += [(i * 7919 + number) % {CONFIG["vocab_size"]} for i in range(asked)]
    for piece in session.stream(ids, max_new_tokens=answered, sampling=Sampling(1.0, seed=0)):
        ids += [] if piece.token is None else [piece.token]
        banks.append(model.bank_bytes)
    ends.append(machine.resident_set_bytes())
model.check_integrity()
print(json.dumps({{
    "peak": machine.peak_resident_set_bytes(),
    "ends": ends,
    "planned": plan.planned_bytes,
    "bank": plan.bank_bytes,
    "banks": [min(banks), max(banks)],
    "kv": plan.kv_bytes,
    "lent": plan.lent_bytes,
    "prompts": plan.prompts.nbytes,
    "chunk": plan.prompts.chunk_tokens,
    "ids": ids,
    "hit_rate": model.totals().hit_rate,
}}))
"""


@pytest.fixture(scope="module")
def big_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("big")
    write_checkpoint(plan_checkpoint(CONFIG), folder / "checkpoint")
    return flashmoe.repack(folder / "checkpoint", folder / "store")


def run(store: Store, memory: int) -> dict[str, Any]:
    command = [sys.executable, "-c", RUN, str(store.path), str(memory)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_peak_is_the_number_whatever_the_number(big_store: Store) -> None:
    refused = run(big_store, 100_000_000)
    least = int(refused["least"])
    assert f"{-(-least // 10**6)}MB" in str(refused["message"])
    banks, prompts, answers = [], [], []
    for memory in (least, least + 60_000_000, least + 150_000_000):
        report = run(big_store, memory)
        assert report["planned"] <= memory
        assert report["peak"] <= memory, report
        assert report["lent"] > 0.5 * report["kv"]
        # Elsewhere banks change in steps of 1/16, and what prompts need is not lent.
        if sys.platform == "linux":
            assert report["peak"] >= 0.98 * memory, report
            assert report["banks"][0] < report["banks"][1] > report["bank"]
        banks.append(report["bank"])
        prompts.append(report["prompts"])
        answers.append((report["chunk"], report["ids"]))
    # Banks of other sizes that change at other times.
    assert answers[0] == answers[1] == answers[2]
    # The bank gets what more memory brings, less the shares of prompts and of what MLX may keep.
    assert prompts[0] < prompts[1] <= prompts[2]
    assert banks[1] - banks[0] > 48_000_000
    assert banks[2] - banks[1] > 70_000_000
    assert banks[1] + prompts[1] - banks[0] - prompts[0] > 55_000_000
    assert banks[2] + prompts[2] - banks[1] - prompts[1] > 80_000_000


def test_everything_is_used_when_it_fits(big_store: Store) -> None:
    report = run(big_store, 2_000_000_000)
    manifest = big_store.manifest
    assert report["bank"] > 0.9 * manifest.streamed_bytes
    assert report["peak"] < 2_000_000_000
