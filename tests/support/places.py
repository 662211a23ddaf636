"""What commands may be pointed at, good and bad."""

import os
import shutil
from pathlib import Path

from flashmoe import repack
from tests.support.checkpoints import edit_config, save_float
from tests.support.families import save_checkpoint

FOLDERS = (
    "quantized",
    "float",
    "dense",
    "truncated",
    "unknown",
    "not_json",
    "no_config",
    "foreign",
    "missing",
)
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


def save_places(root: Path) -> dict[str, Path]:
    """Good and bad checkpoints and a store, by the name that cases call them."""
    places = {name: root / name for name in FOLDERS}
    save_checkpoint(places["quantized"], "mixtral")
    save_checkpoint(places["float"], "mixtral", bits=None)
    save_float(places["dense"], LLAMA)
    for name in ("truncated", "unknown", "not_json", "no_config"):
        shutil.copytree(places["quantized"], places[name])
    weights = places["truncated"] / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    edit_config(places["unknown"], model_type="nonesuch")
    (places["not_json"] / "config.json").write_text("{oops")
    (places["no_config"] / "config.json").unlink()
    places["foreign"].mkdir()
    (places["foreign"] / "notes.md").write_text("mine")
    store = repack(places["quantized"], root / "tiny.flashmoe")
    return {**places, "store": store.path, "root": root}
