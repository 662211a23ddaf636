"""Packed checkpoints of other packages: the same weights as these unpack, by any way of making
a store of them."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from flashmoe import FlashMoEModel, repack
from flashmoe.checkpoint.source import check_files, resolve
from flashmoe.repacking import lazy_model
from flashmoe.repacking.job import prepare
from flashmoe.repacking.presets import choose_recipe
from tests.support.checkpoints import store_tensors
from tests.support.format_cases import (
    FORMATS,
    digest,
    digests,
    save_in_shards,
    save_unpacked,
    unpacked,
)
from tests.support.hub import Hub
from tests.support.stores import folder_content

FP8 = ("fp8_deepseek_v3", "fp8_qwen3_moe")
# Those whose weights become floats, and those that MLX has packed too.
FLOATS = (*FP8, "bnb_deepseek_v3", "gptq_act_order_qwen3_moe")
KEPT = ("mxfp4_gpt_oss", "awq_qwen3_moe", "gptq_mixtral")
CASES = (*FLOATS, *KEPT)
TOLERANCE = 1e-4
# A bias is rounded to float16, unless all zeros are powers of two.
TOLERANCES = {"awq_qwen3_moe": 0.05}


@pytest.mark.parametrize("case", FP8)
def test_weights_are_what_transformers_unpacks(case: str) -> None:
    arrays = unpacked(FORMATS / case)
    assert {name: digest(array) for name, array in arrays.items()} == digests(FORMATS / case)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    golden = mx.load(str(FORMATS / case / "golden.safetensors"))
    bits = 32 if case in FLOATS else None
    store = repack(FORMATS / case, tmp_path / "store", bits=bits)
    with FlashMoEModel(store, cache="min") as model:
        logits = model.model(golden["prompt"][None])[0]
    tolerance = TOLERANCES.get(case, TOLERANCE)
    assert mx.abs(golden["logits"]).max().item() > 1
    assert mx.abs(logits - golden["logits"]).max().item() < tolerance


@pytest.mark.parametrize("case,bits", [*((case, 32) for case in FLOATS), ("fp8_qwen3_moe", 4)])
def test_the_store_is_that_of_the_unpacked_checkpoint(
    case: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"bits": bits, "group_size": 32 if bits < 16 else None}
    floats = save_unpacked(FORMATS / case, tmp_path / "floats")
    expected = store_tensors(repack(floats, tmp_path / "expected", **options))
    store = repack(FORMATS / case, tmp_path / "store", **options)
    assert store_tensors(store) == expected
    monkeypatch.setattr(lazy_model, "trace", lambda *_: None)
    whole = repack(FORMATS / case, tmp_path / "whole", **options)
    assert folder_content(whole.path) == folder_content(store.path)


@pytest.mark.parametrize("case", [*KEPT, "compressed_qwen3_moe"])
def test_what_cannot_be_traced_is_read_whole(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = folder_content(repack(FORMATS / case, tmp_path / "store").path)
    monkeypatch.setattr(lazy_model, "trace", lambda *_: None)
    assert folder_content(repack(FORMATS / case, tmp_path / "whole").path) == expected


@pytest.mark.parametrize("case", CASES)
def test_everything_is_made_by_pieces(case: str) -> None:
    checkpoint = resolve(FORMATS / case)
    recipe = choose_recipe(None, bits=16, group_size=None, resident_bits=None, method=None)
    tensors = check_files(checkpoint)
    order = prepare(checkpoint, tensors, recipe, asked=False).schedule
    assert order.late == ()
    # A piece needs its own rows of the source, no more than its own tensor at least.
    largest = max(tensor.info.nbytes for tensor in tensors.values())
    assert all(piece.last - piece.first <= largest for piece in order.pieces)


@pytest.mark.parametrize("case", CASES)
def test_from_the_hub(case: str, hub: Hub, tmp_path: Path) -> None:
    options = {"bits": 32 if case in FLOATS else None}
    expected = store_tensors(repack(FORMATS / case, tmp_path / "expected", **options))
    shutil.rmtree(hub.files)
    save_in_shards(FORMATS / case, hub.files, 3)
    store = repack("owner/name", tmp_path / "store", **options)
    assert store_tensors(store) == expected
    # Scales come in few requests, although they are needed out of turn.
    assert 3 < hub.downloads < 30


KILLED = """
import os, signal, sys, time
from flashmoe.repacking import walk
from flashmoe.repacking.repack import repack

walk.STEP_SECONDS = 0.0

def stop(done, total):
    if 2 * done > total:
        time.sleep(0.3)  # what is whole gets noted meanwhile
        os.kill(os.getpid(), signal.SIGKILL)

repack(sys.argv[1], sys.argv[2], bits=32, progress=stop)
"""


def test_a_killed_run_goes_on(tmp_path: Path, dest: Path) -> None:
    source = save_in_shards(FORMATS / "fp8_deepseek_v3", tmp_path / "source", 4)
    done: dict[str, list[int]] = {"whole": [], "dest": []}
    repack(
        source,
        tmp_path / "whole.flashmoe",
        bits=32,
        progress=lambda n, _: done["whole"].append(n),
    )
    ran = subprocess.run([sys.executable, "-c", KILLED, str(source), str(dest)], check=False)
    assert ran.returncode == -signal.SIGKILL
    repack(source, dest, bits=32, progress=lambda n, _: done["dest"].append(n))
    assert len(done["dest"]) < len(done["whole"])
    assert folder_content(dest) == folder_content(tmp_path / "whole.flashmoe")
