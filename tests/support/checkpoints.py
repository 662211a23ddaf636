"""Checkpoints and stores as plain tensors, and a tokenizer small enough for the tiny families."""

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import quantize_model, save_config, save_model
from safetensors import deserialize
from tokenizers import Tokenizer, models, pre_tokenizers

from flashmoe.store.reader import Store
from tests.support.families import FAMILIES, build_model, save_checkpoint

# dtype, shape, bytes
Tensor = tuple[str, tuple[int, ...], bytes]

GOLDEN = Path(__file__).parents[1] / "golden"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast"}


def file_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, read without MLX."""
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in deserialize(path.read_bytes())
    }


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's weight files."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= file_tensors(path)
    return tensors


def store_tensors(store: Store) -> dict[str, Tensor]:
    """Every tensor of a store, the experts' stacked again as `[n_experts, ...]`."""
    tensors: dict[str, Tensor] = {}
    for shard in store.manifest.resident:
        tensors |= file_tensors(store.file(shard.file))
    for layer in store.manifest.layers:
        layout = layer.layout
        content = store.file(layout.file).read_bytes()
        for c in layout.record.components:
            starts = [layout.record_offset(e) + c.offset for e in range(layout.n_experts)]
            stacked = b"".join(content[start : start + c.nbytes] for start in starts)
            tensors[f"{layout.path}.{c.name}"] = (c.dtype, (layout.n_experts, *c.shape), stacked)
    return tensors


def mlx_arrays(folder: Path) -> dict[str, mx.array]:
    """Every tensor of a checkpoint's weight files as MLX loads it."""
    arrays: dict[str, mx.array] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        arrays |= mx.load(str(path))
    return arrays


def as_tensor(array: mx.array) -> Tensor:
    """An MLX array as safetensors would store it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "array.safetensors"
        mx.save_safetensors(str(path), {"x": array})
        return file_tensors(path)["x"]


def save_quantized(
    folder: Path,
    config: dict[str, Any],
    *,
    bits: int,
    group_size: int,
    predicate: Callable[[str, Any], bool | dict[str, Any]] | None = None,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
) -> None:
    """Writes what `mlx_lm.convert` writes for a random model of `config`."""
    model = build_model(config, seed, dtype)
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(model, config, group_size, bits, quant_predicate=predicate)
    save_model(folder, model)
    save_config(config, folder / "config.json")


def save_float(folder: Path, config: dict[str, Any], *, dtype: mx.Dtype = mx.float32) -> None:
    """Writes an unquantized random model of `config`."""
    save_model(folder, build_model(config, 0, dtype))
    save_config(dict(config), folder / "config.json")


def save_shards(checkpoint: Path, folder: Path, n_shards: int = 3) -> None:
    """Writes a checkpoint's tensors again, in turn to model-0.safetensors and so on."""
    folder.mkdir()
    arrays = mlx_arrays(checkpoint)
    names = sorted(arrays)
    weight_map: dict[str, str] = {}
    for shard in range(n_shards):
        part = {name: arrays[name] for name in names[shard::n_shards]}
        mx.save_safetensors(str(folder / f"model-{shard}.safetensors"), part)
        weight_map |= dict.fromkeys(part, f"model-{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(checkpoint / "config.json", folder)


def add_tokenizer(folder: Path, vocabulary: int = 128) -> None:
    """Gives a checkpoint the words t0, t1, ... as its vocabulary."""
    words = {f"t{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes keys of a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def save_speaking(
    folder: Path, family: str, changes: Mapping[str, Any] | None = None, **options: Any
) -> Path:
    """A tiny checkpoint with a tokenizer; `changes` go into the config before it is built."""
    folder.mkdir(parents=True)
    config = {**FAMILIES[family], **(changes or {})}
    if changes:
        save_quantized(folder, config, bits=4, group_size=64, **options)
    else:
        save_checkpoint(folder, family, **options)
    add_tokenizer(folder)
    return folder
