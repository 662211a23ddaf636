"""Small checkpoints whose records are large enough to be read apart and ahead, four routers."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

from mlx_lm.utils import quantize_model, save_config, save_model

import flashmoe
from flashmoe.bank.arrivals import APART_BYTES
from flashmoe.store.reader import Store
from tests.support.families import FAMILIES, build_model

N_EXPERTS, TOP_K, N_LAYERS = 12, 3, 3
# Changes to a family's config and bits per weight.
WIDE: dict[str, tuple[dict[str, Any], int]] = {
    "qwen3_moe": (
        {"num_experts": N_EXPERTS, "num_experts_per_tok": TOP_K, "hidden_size": 256}
        | {"moe_intermediate_size": 576, "mlp_only_layers": []},
        4,
    ),
    "deepseek_v3": (
        {"n_routed_experts": N_EXPERTS, "num_experts_per_tok": TOP_K, "hidden_size": 128}
        | {"moe_intermediate_size": 640, "first_k_dense_replace": 0, "n_group": 4, "topk_group": 2},
        8,
    ),
    "gpt_oss": (
        {"num_local_experts": N_EXPERTS, "num_experts_per_tok": TOP_K, "hidden_size": 256}
        | {"intermediate_size": 576},
        4,
    ),
    "qwen3_next": (
        {"num_experts": N_EXPERTS, "num_experts_per_tok": TOP_K, "hidden_size": 128}
        | {"moe_intermediate_size": 640, "mlp_only_layers": []},
        8,
    ),
}


def wide_store(folder: Path, family: str, n_layers: int = N_LAYERS) -> Store:
    """A store of the family's model, made in `folder`; all of its records are read apart."""
    changes, bits = WIDE[family]
    config = copy.deepcopy(FAMILIES[family]) | changes | {"num_hidden_layers": n_layers}
    model = build_model(config, seed=0)
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(model, config, 64, bits)
    save_model(folder / "checkpoint", model)
    save_config(config, folder / "checkpoint" / "config.json")
    store = flashmoe.repack(folder / "checkpoint", folder / "store.flashmoe")
    layouts = [layer.layout for layer in store.manifest.layers]
    assert len(layouts) == n_layers
    assert min(layout.record.stride for layout in layouts) >= APART_BYTES
    return store
