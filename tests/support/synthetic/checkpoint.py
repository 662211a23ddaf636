"""Write a checkpoint with the real shapes of an architecture and random weights, of any size.

Tensor names and shapes come from the mlx-lm model of a config, built and quantized without
evaluating it; bytes are made and written piece by piece, so a few hundred megabytes of memory do
for any model. The result is what `mlx_lm.convert` would write: `flashmoe repack` takes it bit for
bit. What the model says means nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.utils import get_total_parameters, quantize_model, save_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import flashmoe
from flashmoe import FlashMoEError
from flashmoe.base.errors import OptionError, SourceError, StoreError
from flashmoe.base.units import format_size
from flashmoe.checkpoint.architecture import (
    REFUSALS,
    build_model,
    expert_modules,
    probe_routing,
    projections_of,
)
from flashmoe.checkpoint.config import Config
from flashmoe.cli.console import byte_progress
from flashmoe.store.layout import safetensors_header
from flashmoe.store.writer import refuse_unless_ours
from tests.support.synthetic.weights import PlannedTensor, choose_spreads, plan_tensors

CONFIGS = Path(__file__).parents[3] / "scripts" / "configs"
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
SHARD_BYTES = 5 * 10**9
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")

Progress = Callable[[int, int], None]


def find_config(model: str) -> Config:
    """The config of a preset, of a config.json, or of the folder that holds one.

    Raises SourceError when there is none.
    """
    presets = sorted(path.stem for path in CONFIGS.glob("*.json"))
    if model in presets:
        return dict(json.loads((CONFIGS / f"{model}.json").read_text()))
    path = Path(model).expanduser()
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_bytes())
    except OSError:
        raise SourceError(
            f"{model} is neither a config.json nor one of the presets {', '.join(presets)}"
        ) from None
    except ValueError as error:
        raise SourceError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise SourceError(f"{path} names no model_type")
    return config


def with_layers(config: Config, layers: int) -> Config:
    """A copy of a config with its first `layers` layers.

    Whatever is stated per layer (a list or a text with as many entries as the model has layers)
    is cut too, at the top level and in nested configs. Raises OptionError when the model has
    fewer.
    """
    config = copy.deepcopy(config)
    levels = [config, *(value for value in config.values() if isinstance(value, dict))]
    levels = [level for level in levels if any(key in level for key in LAYER_COUNTS)]
    if not levels:
        raise SourceError(f"the config states its layers under none of {', '.join(LAYER_COUNTS)}")
    for level in levels:
        count = next(level[key] for key in LAYER_COUNTS if key in level)
        if not 1 <= layers <= count:
            raise OptionError(f"--layers must be from 1 to {count}, not {layers}")
        for key, value in level.items():
            if isinstance(value, list | str) and len(value) == count:
                level[key] = value[:layers]
            elif key in LAYER_COUNTS:
                level[key] = layers
    return config


@dataclass(frozen=True)
class CheckpointPlan:
    """Everything that a checkpoint will hold, but for the random bytes."""

    config: Config
    tensors: tuple[PlannedTensor, ...]
    n_parameters: int
    vocabulary: int

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.spec.nbytes for tensor in self.tensors)

    @property
    def written_bytes(self) -> int:
        """Those that are no holes."""
        return sum(tensor.written_bytes for tensor in self.tensors)


def plan_checkpoint(
    config: Config,
    *,
    layers: int | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    seed: int = 0,
) -> CheckpointPlan:
    """Plan a random quantized checkpoint of a config; reseeds MLX's global generator.

    `layers` cuts the model; `bits` and `group_size` default to the mode's own (affine: 4 and
    64); with 16 bits nothing is quantized. Floats are bfloat16 where the family lets them be cast.
    The same arguments give the same bytes.

    Raises SourceError for a config that mlx-lm does not run or that has no routed experts,
    OptionError for packing that does not fit it.
    """
    if seed < 0:
        raise OptionError(f"a seed must be at least 0, not {seed}")
    config = config if layers is None else with_layers(config, layers)
    config = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    mx.random.seed(seed)
    model, _ = build_model(config)
    if not expert_modules(model):
        raise SourceError(
            f"this {config['model_type']} model has no routed experts; has it too few layers?"
        )
    try:
        vocabulary = probe_routing(config).vocabulary
    except REFUSALS as error:
        raise SourceError(
            f"mlx-lm cannot run this {config['model_type']} model ({type(error).__name__}: "
            f"{error}); has it too few layers?"
        ) from error
    spreads = choose_spreads(model, vocabulary)
    model, config = _quantize(model, config, bits, group_size, mode)
    tensors = plan_tensors(model, spreads, seed)
    return CheckpointPlan(config, tensors, int(get_total_parameters(model)), vocabulary)


def write_checkpoint(plan: CheckpointPlan, folder: Path, progress: Progress | None = None) -> None:
    """Write a planned checkpoint into the new folder `folder`; if that fails, nothing is left.

    `progress(done_bytes, total_bytes)` is called as tensors are written. Raises StoreError when
    the folder exists or cannot be written.
    """
    try:
        folder.mkdir(parents=True)
        try:
            _check_free_disk(folder, plan.written_bytes)
            _write_tensors(plan, folder, progress)
            _write_tokenizer(folder, plan.vocabulary)
            save_config(dict(plan.config), folder / "config.json")
        except BaseException:
            shutil.rmtree(folder)
            raise
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror or error}") from error


def _quantize(
    model: nn.Module, config: Config, bits: int | None, group_size: int | None, mode: str
) -> tuple[nn.Module, Config]:
    """What `mlx_lm.convert` does to a model and its config, unevaluated."""
    may_cast = getattr(model, "cast_predicate", lambda name: True)

    def cast(name: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(mx.bfloat16) if floating and may_cast(name) else array

    model.update(tree_map_with_path(cast, model.parameters()))
    if bits == 16:
        return model, config
    try:
        # quantize_model prints the bits per weight.
        with contextlib.redirect_stdout(io.StringIO()):
            model, config = quantize_model(model, config, group_size, bits, mode=mode)
    except ValueError as error:
        raise OptionError(f"mlx does not pack weights like that: {error}") from error
    for path, module in expert_modules(model).items():
        for name, projection in projections_of(module).items():
            if "scales" not in projection:
                raise OptionError(
                    f"{path}.{name} has {projection['weight'].shape[-1]} inputs per row, no "
                    "multiple of the group size; choose another --group-size"
                )
    return model, config


def _check_free_disk(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise StoreError(
            f"{folder} needs {format_size(needed_bytes)} but its disk has {format_size(free)} "
            "free; free some, choose fewer --layers or another destination"
        )


def _write_tensors(plan: CheckpointPlan, folder: Path, progress: Progress | None) -> None:
    shards = _shards(plan.tensors)
    done = 0
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = safetensors_header([tensor.spec for tensor in shard])
        begin = len(header)
        with (folder / name).open("wb", buffering=0) as file:
            file.write(header)
            file.truncate(begin + sum(tensor.spec.nbytes for tensor in shard))
            for tensor in shard:
                files[tensor.spec.name] = name
                for offset, piece in tensor.pieces():
                    file.seek(begin + offset)
                    rest = memoryview(piece)
                    while rest:
                        rest = rest[file.write(rest) :]
                    done += len(piece)
                    if progress is not None:
                        progress(done, plan.written_bytes)
                begin += tensor.spec.nbytes
    index = {
        "metadata": {"total_size": plan.nbytes, "total_parameters": plan.n_parameters},
        "weight_map": dict(sorted(files.items())),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))


def _shards(tensors: Sequence[PlannedTensor]) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.spec.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.spec.nbytes
    return shards


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A byte-level tokenizer of exactly `vocabulary` tokens.

    The first are single bytes, printable ASCII before others; the rest have a text each, and no
    text is encoded to them.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (c not in "ĠĊ", c))
    tokens = [*letters, *(f"Ġ#{i}" for i in range(len(letters), vocabulary))][:vocabulary]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    # A family's own tokenizer class would add these to the vocabulary.
    stated = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"))
    stated |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a config.json, the folder of one, or a preset's name")
    parser.add_argument("dest", type=Path, help="where the checkpoint goes; must not exist")
    parser.add_argument("--layers", type=int, help="keep this many layers (default: all)")
    parser.add_argument(
        "--bits", type=int, help="bits per weight, 16 for bfloat16 (default: the mode's, 4 or 8)"
    )
    parser.add_argument("--group-size", type=int, help="weights per scale (default: the mode's)")
    parser.add_argument("--mode", choices=MODES, default="affine", help="default: affine")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--store", type=Path, help="repack the checkpoint to a store there, then delete it"
    )
    args = vars(parser.parse_args())
    model, dest, store = args.pop("model"), args.pop("dest"), args.pop("store")
    try:
        if store is not None:
            refuse_unless_ours(store, force=False)
        plan = plan_checkpoint(find_config(model), **args)
        with byte_progress("writing") as progress:
            write_checkpoint(plan, dest, progress)
        if store is not None:
            with byte_progress("repacking") as progress:
                flashmoe.repack(dest, store, progress=progress)
            shutil.rmtree(dest)
    except FlashMoEError as error:
        sys.exit(f"error: {error}")
    print(dest if store is None else store)
