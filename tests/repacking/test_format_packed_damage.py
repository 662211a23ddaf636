"""AWQ, GPTQ and bitsandbytes checkpoints that are damaged, that nobody reads, or that are consumed
while they are repacked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe import OptionError, SourceError, repack
from flashmoe.repacking import walk
from tests.support.checkpoints import Tensor, file_tensors
from tests.support.format_cases import FORMATS, save_in_shards, save_tensors
from tests.support.hub import Hub
from tests.support.refusals import refused
from tests.support.stores import folder_content

Tensors = dict[str, Tensor]
Q_PROJ = "model.layers.0.self_attn.q_proj"
O_PROJ = "model.layers.0.self_attn.o_proj"
AWQ, GPTQ = "awq_qwen3_moe", "gptq_mixtral"
ORDERED, BNB = "gptq_act_order_qwen3_moe", "bnb_deepseek_v3"
STATE = f"{O_PROJ}.weight.quant_state.bitsandbytes__nf4"


def without(name: str) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        del tensors[name]

    return damage


def cut(name: str, axis: int, size: int) -> Callable[[Tensors], None]:
    """A tensor with fewer rows or columns."""

    def damage(tensors: Tensors) -> None:
        dtype, shape, content = tensors[name]
        array = np.frombuffer(content, np.uint8).reshape(*shape, -1)
        part = array.take(range(size), axis)
        tensors[name] = (dtype, part.shape[:-1], part.tobytes())

    return damage


def filled(name: str, number: int) -> Callable[[Tensors], None]:
    """A tensor of int32 that are all the same."""

    def damage(tensors: Tensors) -> None:
        dtype, shape, content = tensors[name]
        same = np.full(len(content) // 4, number, np.int32)
        tensors[name] = (dtype, shape, same.tobytes())

    return damage


def stated(name: str, **changes: Any) -> Callable[[Tensors], None]:
    """A quant_state that says something else; keys that are None are left out."""

    def damage(tensors: Tensors) -> None:
        state = {**json.loads(tensors[name][2]), **changes}
        content = json.dumps({k: v for k, v in state.items() if v is not None}).encode()
        tensors[name] = ("U8", (len(content),), content)

    return damage


def as_dtype(name: str, dtype: str) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors[name] = (dtype, *tensors[name][1:])

    return damage


DAMAGE: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "awq scales missing": (AWQ, without(f"{Q_PROJ}.scales"), f"lacks {Q_PROJ}.scales"),
    "awq zeros missing": (AWQ, without(f"{Q_PROJ}.qzeros"), f"lacks {Q_PROJ}.qzeros"),
    "awq codes missing": (AWQ, without(f"{Q_PROJ}.qweight"), f"{Q_PROJ}"),
    "awq codes too narrow": (AWQ, cut(f"{Q_PROJ}.qweight", 1, 7), f"{Q_PROJ}.scales"),
    "awq zeros too narrow": (AWQ, cut(f"{Q_PROJ}.qzeros", 1, 7), f"{Q_PROJ}.qzeros"),
    "awq too few inputs": (AWQ, cut(f"{O_PROJ}.qweight", 0, 63), f"{O_PROJ}.qweight"),
    "awq scales of integers": (AWQ, as_dtype(f"{Q_PROJ}.scales", "I16"), f"{Q_PROJ}.scales"),
    "gptq scales missing": (GPTQ, without(f"{Q_PROJ}.scales"), f"lacks {Q_PROJ}.scales"),
    "gptq scales too few": (GPTQ, cut(f"{Q_PROJ}.scales", 0, 1), f"{Q_PROJ}.qzeros"),
    "gptq codes too narrow": (GPTQ, cut(f"{Q_PROJ}.qweight", 1, 63), f"{Q_PROJ}.scales"),
    "gptq too few inputs": (GPTQ, cut(f"{Q_PROJ}.qweight", 0, 7), f"{Q_PROJ}.g_idx"),
    "gptq zeros too narrow": (GPTQ, cut(f"{Q_PROJ}.qzeros", 1, 4), "2-bit zeros"),
    "gptq order unsaid": (GPTQ, filled(f"{Q_PROJ}.g_idx", 1), "desc_act false"),
    "gptq order missing": (ORDERED, without(f"{O_PROJ}.g_idx"), f"lacks {O_PROJ}.g_idx"),
    "gptq order too short": (ORDERED, cut(f"{O_PROJ}.g_idx", 0, 63), f"{O_PROJ}.g_idx"),
    "gptq no such group": (ORDERED, filled(f"{O_PROJ}.g_idx", 2), "none of the 2"),
    "bnb scales missing": (BNB, without(f"{O_PROJ}.weight.absmax"), "lacks"),
    "bnb scales of scales missing": (BNB, without(f"{O_PROJ}.weight.nested_absmax"), "lacks"),
    "bnb state missing": (BNB, without(STATE), f"{O_PROJ}.weight.absmax"),
    "bnb codes too few": (BNB, cut(f"{O_PROJ}.weight", 0, 1000), f"{O_PROJ}.weight"),
    "bnb another shape": (BNB, stated(STATE, shape=[32, 32]), f"{O_PROJ}.weight"),
    "bnb no shape": (BNB, stated(STATE, shape=None), "does not say"),
    "bnb a shape of words": (BNB, stated(STATE, shape=["a", 2]), "does not say"),
    "bnb another kind": (BNB, stated(STATE, quant_type="fp4"), "does not say"),
    "bnb no block": (BNB, stated(STATE, blocksize=0), "does not say"),
    "bnb an expert's block": (
        BNB,
        stated(STATE.replace("self_attn.o_proj", "mlp.experts.3.up_proj"), dtype="float16"),
        "mlp.experts.3.up_proj",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, source: Path, dest: Path) -> None:
    case, damage, words = DAMAGE[name]
    tensors = file_tensors(FORMATS / case / "model.safetensors")
    damage(tensors)
    source.mkdir()
    save_tensors(source / "model.safetensors", tensors)
    shutil.copy(FORMATS / case / "config.json", source)
    with refused(SourceError, words):
        repack(source, dest, bits=32 if case in (ORDERED, BNB) else None)
    assert not (dest / "flashmoe.json").exists()


@pytest.mark.parametrize(
    ("case", "settings", "words"),
    [
        (AWQ, {"version": "gemv_fast"}, ("gemv_fast", "gemm and gemv")),
        (AWQ, {"bits": 8}, ("AWQ with 8 bits",)),
        (GPTQ, {"checkpoint_format": "gptq_p"}, ("gptq_p", "gptq and gptq_v2")),
        (GPTQ, {"is_marlin_format": True}, ("marlin",)),
        (GPTQ, {"bits": 3}, ("4-bit zeros", "3 bits")),
        (AWQ, {"quant_method": "bitsandbytes"}, ("bitsandbytes", "none of its tensors")),
        (BNB, {"quant_method": "awq"}, ("AWQ", "none of its tensors")),
        (BNB, {"quant_method": "gptq"}, ("GPTQ", "none of its tensors")),
    ],
)
def test_variants_that_nobody_reads(
    case: str, settings: dict[str, Any], words: tuple[str, ...], source: Path, dest: Path
) -> None:
    shutil.copytree(FORMATS / case, source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= settings
    (source / "config.json").write_text(json.dumps(config))
    with refused(SourceError, *words):
        repack(source, dest)
    assert not dest.exists()


def test_a_recipe_is_for_floats(dest: Path) -> None:
    with refused(OptionError, "already quantized", "bit for bit"):
        repack(FORMATS / AWQ, dest, bits=3)
    store = repack(FORMATS / ORDERED, dest, bits=3, group_size=32)
    assert {
        q.bits for layer in store.manifest.layers for q in layer.layout.projections.values()
    } == {3}


def test_a_consumed_checkpoint_says_its_shapes_still(
    source: Path, dest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "STEP_SECONDS", 0.0)
    source.mkdir()
    shutil.copy(FORMATS / BNB / "config.json", source)
    tensors = sorted(file_tensors(FORMATS / BNB / "model.safetensors").items())
    for shard in range(3):
        part = tensors[len(tensors) * shard // 3 : len(tensors) * (shard + 1) // 3]
        save_tensors(source / f"model-{shard}.safetensors", dict(part))
    kept = folder_content(repack(source, tmp_path / "kept.flashmoe", bits=32).path)

    def stop(done: int, total: int) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repack(source, dest, bits=32, consume=True, progress=stop)
    assert len(list(source.glob("model*.safetensors"))) < 3
    repack(source, dest, bits=32, consume=True)
    assert folder_content(dest) == kept


def test_an_interrupted_run_from_the_hub_goes_on(
    hub: Hub, dest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "STEP_SECONDS", 0.0)
    shutil.rmtree(hub.files)
    save_in_shards(FORMATS / AWQ, hub.files, 3)
    whole = folder_content(repack("owner/name", tmp_path / "whole.flashmoe").path)

    def stop(done: int, total: int) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repack("owner/name", dest, progress=stop)
    seen: list[int] = []
    repack("owner/name", dest, progress=lambda done, total: seen.append(done))
    assert seen[1] > 0
    assert folder_content(dest) == whole
