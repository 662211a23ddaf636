"""Synthetic checkpoints: of any family, repacked bit for bit, the same bytes for the same seed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import flashmoe
from flashmoe import FlashMoEModel, OptionError, Sampling, SourceError, StoreError
from flashmoe.store.reader import open_store
from tests.support.checkpoints import checkpoint_tensors, mlx_arrays, store_tensors
from tests.support.families import FAMILIES
from tests.support.stores import folder_content
from tests.support.synthetic.checkpoint import (
    CheckpointPlan,
    find_config,
    plan_checkpoint,
    with_layers,
    write_checkpoint,
)
from tests.support.synthetic.weights import BRANCH_GAIN

SCRIPTS = Path(__file__).parents[2] / "scripts"

# Experts of SwitchGLU and SwitchMLP, alone and beside shared ones, dense layers and SSMs, in
# nested configs, with biases, with tied embeddings.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {}),
    ("qwen3_moe", {"bits": 3, "group_size": 32}),
    ("qwen3_moe", {"bits": 8}),
    ("qwen3_moe", {"mode": "mxfp8"}),
    ("qwen2_moe", {"bits": 5}),
    ("deepseek_v3", {}),
    ("gpt_oss", {"mode": "mxfp4"}),
    ("granitemoe", {}),
    ("nemotron_h", {"bits": 2}),
    ("qwen3_5_moe", {}),
]


def ids(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join(map(str, (case[0], *case[1].values())))


@pytest.mark.parametrize(("family", "options"), CASES, ids=map(ids, CASES))
def test_families(family: str, options: dict[str, Any], source: Path, dest: Path) -> None:
    write_checkpoint(plan_checkpoint(FAMILIES[family], **options), source)
    store = flashmoe.repack(source, dest)
    assert store_tensors(store) == checkpoint_tensors(source)
    for layer in store.manifest.layers:
        # Families ask for more bits in the last one.
        packing = next(iter(layer.layout.projections.values()))
        assert packing.mode == options.get("mode", "affine")
        assert packing.bits == options.get("bits", 8 if packing.mode == "mxfp8" else 4)
    with FlashMoEModel(store, cache="min") as model:
        logits = model.model(mx.arange(16)[None]).astype(mx.float32)
        assert mx.isfinite(logits).all()
        # Over tokens they vary as much as over the vocabulary.
        spread = mx.std(logits).item()
        assert 0.1 < spread < 2
        assert mx.std(logits, axis=1).mean().item() > 0.5 * spread
        assert len(model.tokenizer) == logits.shape[-1]
        stream = model.stream("Hello", 8, temperature=1.0, seed=0)
        assert [piece.text for piece in stream]
        assert model.totals().generated_tokens == 8


@pytest.mark.parametrize(
    ("mode", "bits", "tolerance"),
    # One scale for the tensor: exact but for bfloat16, or the nearest of those that the mode has.
    [
        ("affine", 2, 0.02),
        ("affine", 4, 0.02),
        ("affine", 6, 0.02),
        ("mxfp4", 4, 0.5),
        ("nvfp4", 4, 0.1),
        ("mxfp8", 8, 0.5),
    ],
)
def test_weights_have_the_spread_of_their_role(
    mode: str, bits: int, tolerance: float, source: Path
) -> None:
    config = FAMILIES["qwen3_moe"] | {"hidden_size": 256, "moe_intermediate_size": 128}
    write_checkpoint(plan_checkpoint(config, mode=mode, bits=bits), source)
    tensors = mlx_arrays(source)
    stated = json.loads((source / "config.json").read_text())["quantization"]
    packing = {key: stated[key] for key in ("bits", "group_size", "mode")}
    layer = "model.layers.1"
    for path, expected in (
        ("model.embed_tokens", 1),
        ("lm_head", 256**-0.5),
        (f"{layer}.self_attn.q_proj", 256**-0.5),
        (f"{layer}.self_attn.o_proj", 64**-0.5 * BRANCH_GAIN),
        (f"{layer}.mlp.switch_mlp.up_proj", 256**-0.5),
        (f"{layer}.mlp.switch_mlp.down_proj", 128**-0.5 * BRANCH_GAIN),
    ):
        parts = [tensors.get(f"{path}.{part}") for part in ("weight", "scales", "biases")]
        values = mx.dequantize(*parts, **packing).astype(mx.float32)
        assert mx.std(values).item() == pytest.approx(expected, rel=tolerance)
        assert abs(mx.mean(values).item()) < 0.05 * expected


def test_text_goes_through_the_tokenizer_and_back(source: Path, dest: Path) -> None:
    config = FAMILIES["qwen3_moe"] | {"vocab_size": 1024}
    write_checkpoint(plan_checkpoint(config), source)
    with FlashMoEModel(flashmoe.repack(source, dest), cache="min") as model:
        text = "Häuser, 家\n"
        tokens = model.tokenizer.encode(text)
        assert len(tokens) == len(text.encode())
        assert model.tokenizer.decode(tokens) == text
        assert model.tokenizer.decode([1000, 1023]) == " #1000 #1023"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_routing_differs_from_token_to_token(tied: bool, source: Path, dest: Path) -> None:
    # Of 64 experts a bank holds the 4 of one token; chance alone would make it hit 6 %.
    config = FAMILIES["qwen3_moe"] | {
        "hidden_size": 256,
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 8,
        "tie_word_embeddings": tied,
        "vocab_size": 4096,
    }
    write_checkpoint(plan_checkpoint(config), source)
    with FlashMoEModel(flashmoe.repack(source, dest), cache="min") as model:
        stream = model.session().stream(
            list(range(16)), max_new_tokens=49, sampling=Sampling(temperature=1.0, seed=0)
        )
        next(stream)
        before = model.totals()
        for _ in stream:
            pass
        spent = model.totals().since(before)
    assert spent.generated_tokens == 48
    assert 0 < spent.hit_rate < 0.2


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    contents = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_checkpoint(plan_checkpoint(FAMILIES["jamba"], seed=seed), tmp_path / folder)
        contents.append(folder_content(tmp_path / folder))
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_fewer_layers_are_the_first_ones(tmp_path: Path) -> None:
    config = FAMILIES["qwen3_moe"]
    write_checkpoint(plan_checkpoint(config), tmp_path / "whole")
    write_checkpoint(plan_checkpoint(config, layers=2), tmp_path / "cut")
    whole, cut = checkpoint_tensors(tmp_path / "whole"), checkpoint_tensors(tmp_path / "cut")
    assert cut == {name: whole[name] for name in whole if "layers.2." not in name}
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["num_hidden_layers"] == 2


def test_lists_per_layer_are_cut() -> None:
    config = {
        "model_type": "x",
        "eos_token_id": [1, 2],
        "text_config": {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "pattern": "ME*"},
    }
    assert with_layers(config, 1)["text_config"] == {
        "num_hidden_layers": 1,
        "layer_types": ["a"],
        "pattern": "M",
    }
    assert config["text_config"]["num_hidden_layers"] == 3


def expert_bytes(plan: CheckpointPlan) -> int:
    """Bytes of one expert of the first layer."""
    layer = [t.spec for t in plan.tensors if "layers.0.mlp.switch_mlp." in t.spec.name]
    return sum(spec.nbytes // spec.shape[0] for spec in layer)


def test_presets_have_the_published_shapes() -> None:
    plan = plan_checkpoint(find_config("qwen3-30b-a3b"))
    assert round(plan.n_parameters / 1e9, 1) == 30.5
    assert expert_bytes(plan) == 3 * 2048 * 768 * 9 // 16
    plan = plan_checkpoint(find_config("qwen3.5-397b-a17b"))
    assert round(plan.n_parameters / 1e9, 1) == 396.3
    assert expert_bytes(plan) == 7_077_888


MEASURE = """
import json, sys
from pathlib import Path
from tests.support.synthetic.checkpoint import plan_checkpoint, write_checkpoint
from flashmoe.base.machine import peak_resident_set_bytes, resident_set_bytes
before = resident_set_bytes()
write_checkpoint(plan_checkpoint(json.loads(sys.argv[1])), Path(sys.argv[2]))
print(peak_resident_set_bytes() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    allowance_bytes = 100_000_000
    config = FAMILIES["qwen3_moe"] | {
        "hidden_size": 1024,
        "moe_intermediate_size": 1024,
        "num_experts": 256,
        "mlp_only_layers": [],
        "num_hidden_layers": 1,
    }
    for name, intermediate in (("a", 512), ("b", 1024)):
        arguments = json.dumps(config | {"moe_intermediate_size": intermediate})
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, arguments, str(tmp_path / name)],
            capture_output=True,
            text=True,
            check=True,
            cwd=SCRIPTS.parent,
        )
        (weights,) = (tmp_path / name).glob("model*.safetensors")
        assert weights.stat().st_size > 2 * allowance_bytes
        assert int(done.stdout) < allowance_bytes
        shutil.rmtree(tmp_path / name)


def test_command(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(FAMILIES["qwen3_moe"]))
    dest, store = tmp_path / "checkpoint", tmp_path / "store"
    command = [sys.executable, SCRIPTS / "make_synthetic.py", config, dest, "--layers", "2"]
    command += ["--bits", "8", "--group-size", "32", "--seed", "3", "--store", store]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{store}\n"
    assert not dest.exists()
    (layer,) = open_store(store).manifest.layers
    assert layer.layout.projections["up_proj"].bits == 8
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert again.stderr.startswith(f"error: {store} already holds a complete store")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 1}, "no routed experts"),
        ({"layers": 9}, "from 1 to 3, not 9"),
        ({"seed": -1}, "at least 0"),
        ({"bits": 7}, "mlx does not pack weights like that"),
        ({"group_size": 128}, "no multiple of the group size"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((OptionError, SourceError), match=message):
        plan_checkpoint(FAMILIES["qwen3_moe"], **options)


def test_a_hybrid_without_a_layer_of_each_kind_is_refused() -> None:
    with pytest.raises(SourceError, match="cannot run this qwen3_5_moe model"):
        plan_checkpoint(FAMILIES["qwen3_5_moe"], layers=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "nor one of the presets qwen3"), ("{", "is not JSON"), ("[]", "no model_type")],
)
def test_configs_that_are_none(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SourceError, match=message):
        find_config(str(tmp_path))


def test_a_failed_write_leaves_nothing(source: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    plan = plan_checkpoint(FAMILIES["qwen3_moe"])
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(plan, source, stop)
    assert not source.exists()
    source.mkdir()
    with pytest.raises(StoreError, match="File exists"):
        write_checkpoint(plan, source)
    assert source.is_dir()
