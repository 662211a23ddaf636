"""Carrying out a repack plan, one projection of one layer in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model

from flashmoe.checkpoint.architecture import build_model, model_classes, probe_routing
from flashmoe.checkpoint.config import Config, read_config
from flashmoe.checkpoint.source import Checkpoint, check_files, resolve
from flashmoe.checkpoint.weights import adapting
from flashmoe.dtypes import array_bytes
from flashmoe.errors import OptionError, SourceError, StoreError
from flashmoe.repacking.identity import SourceHasher
from flashmoe.repacking.plan import RepackPlan, plan_repack
from flashmoe.repacking.presets import AS_IS, choose_recipe
from flashmoe.repacking.quantize import Settings, Tensors, quantize_lazily, settle
from flashmoe.repacking.recipe import Recipe
from flashmoe.repacking.sizes import PlannedSizes, sizes_of
from flashmoe.store.layout import LayerLayout
from flashmoe.store.manifest import LayerFile, Manifest, Source
from flashmoe.store.reader import Store, is_store, open_store
from flashmoe.store.writer import StoreWriter, refuse_unless_ours

Progress = Callable[[int, int], None]


def repack(
    source: str | Path,
    dest: str | Path | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    resident_bits: int | None = None,
    method: str | None = None,
    recipe: str | Path | Recipe | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Store:
    """Turn a checkpoint (folder or Hub id) into a store at `dest` (default NAME.flashmoe).

    A quantized MLX checkpoint is repacked bit for bit and takes no `bits`. A float one is
    quantized: `bits` 2, 3, 4, 5, 6 or 8 (default 4) in groups of `group_size` 32, 64 or 128
    (default 64), `resident_bits` (default `bits`) for everything but the experts; 32 keeps
    floats as they are, 16 rounds float32 to bfloat16. `method` "rtn" rounds to nearest as
    mx.quantize does, "hqq" fits scales and biases to the weights. A `recipe`, by name or from a
    TOML file, states all of this part by part.
    `progress(done_bytes, total_bytes)` is called as tensors are written.

    Raises SourceError, StoreError or OptionError; whatever happens, `dest` looks complete only
    once it is.
    """
    chosen = choose_recipe(
        recipe, bits=bits, group_size=group_size, resident_bits=resident_bits, method=method
    )
    asked = any(x is not None for x in (bits, group_size, resident_bits, method, recipe))
    name = Path(source).expanduser().resolve().name
    folder = Path(dest) if dest is not None else Path(f"{name}.flashmoe")
    # Before anything is fetched.
    refuse_unless_ours(folder, force)
    if is_store(Path(source).expanduser()):
        raise SourceError(f"{source} is a store already; repack the checkpoint it was made from")
    checkpoint = resolve(source, revision)
    check_files(checkpoint)
    plan, tensors = _prepare(source, checkpoint, chosen, asked)
    hasher = SourceHasher(checkpoint)
    try:
        with StoreWriter(folder, force=force) as writer:
            _check_free_disk(folder, plan)
            resident, layers = _write(plan, tensors, writer, progress)
            copied = {path.name: writer.copy(path) for path in checkpoint.copied_files}
            writer.commit(
                Manifest(
                    model_type=plan.model_type,
                    parameters=plan.parameters,
                    source=Source(checkpoint.repo, checkpoint.revision, hasher.result()),
                    quantization=plan.quantization,
                    resident=resident,
                    layers=layers,
                    copied=copied,
                )
            )
    except RuntimeError as error:  # what MLX raises when a weight file cannot be read
        raise SourceError(f"{source} cannot be read: {error}") from error
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        hasher.close()
    return open_store(folder)


def dry_run(
    source: str | Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    resident_bits: int | None = None,
    method: str | None = None,
    recipe: str | Path | Recipe | None = None,
    revision: str | None = None,
) -> PlannedSizes:
    """The sizes of what `repack` with these options would write; nothing is. Raises as it."""
    chosen = choose_recipe(
        recipe, bits=bits, group_size=group_size, resident_bits=resident_bits, method=method
    )
    asked = any(x is not None for x in (bits, group_size, resident_bits, method, recipe))
    checkpoint = resolve(source, revision)
    check_files(checkpoint)
    plan, _ = _prepare(source, checkpoint, chosen, asked)
    return sizes_of(plan)


def _prepare(
    source: str | Path, checkpoint: Checkpoint, recipe: Recipe, asked: bool
) -> tuple[RepackPlan, Tensors]:
    model, config = load_lazily(checkpoint)
    routing = probe_routing(config)
    settings: Settings = {}
    if not _is_quantized(model):
        settings = settle(model, recipe)
    elif asked and recipe != AS_IS:
        raise OptionError(
            f"{source} is already quantized and is repacked bit for bit; "
            "leave out bits, group size, resident bits, method and recipe"
        )
    tensors = quantize_lazily(model, settings)
    return plan_repack(model, config, routing, settings), tensors


def load_lazily(checkpoint: Checkpoint) -> tuple[nn.Module, Config]:
    """The checkpoint's mlx-lm model with weights that are read only when evaluated.

    Raises SourceError when the config or the tensors are not what the family expects.
    """
    _, config = build_model(read_config(checkpoint.folder))
    packing = config.get("quantization_config") or {}
    if config.get("quantize_activations") or packing.get("quant_method") == "bitnet":
        raise SourceError(
            f"{checkpoint.repo} quantizes activations, which streamed experts do not support"
        )
    model_class, args_class = model_classes(config)
    try:
        model, config = load_model(
            checkpoint.folder,
            lazy=True,
            model_config=config,
            get_model_classes=lambda config: (adapting(model_class), args_class),
        )
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # mlx-lm names the tensors on the lines after the first.
        reason = " ".join(line.strip() for line in lines[:2])[:300]
        raise SourceError(
            f"{checkpoint.repo} is not a {config['model_type']} checkpoint that mlx-lm can "
            f"load: {reason}"
        ) from error
    return model, config


def _write(
    plan: RepackPlan, tensors: Tensors, writer: StoreWriter, progress: Progress | None
) -> tuple[Any, tuple[LayerFile, ...]]:
    done = 0

    def advance(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        if progress is not None:
            progress(done, plan.total_bytes)

    advance(0)
    resident = []
    for shard in plan.resident:
        names = [tensor.name for tensor in shard.tensors]
        contents = _evaluated(tensors, names, advance)
        resident.append(writer.write_resident(shard.file, shard.tensors, contents))
    layers = tuple(_write_layer(layer, tensors, writer, advance) for layer in plan.layers)
    return tuple(resident), layers


def _evaluated(
    tensors: Tensors, names: list[str], advance: Callable[[int], None]
) -> Iterator[memoryview]:
    """The bytes of each array in turn; an array is dropped before the next is evaluated."""
    for name in names:
        content = array_bytes(tensors.pop(name))
        yield content
        advance(len(content))
        del content


def _write_layer(
    layer: LayerLayout, tensors: Tensors, writer: StoreWriter, advance: Callable[[int], None]
) -> LayerFile:
    out = writer.layer(layer)
    projections = dict.fromkeys(component.projection for component in layer.record.components)
    for projection in projections:
        components = [c for c in layer.record.components if c.projection == projection]
        # Together, because a quantized weight, its scales and its biases are one operation.
        parts = [tensors.pop(f"{layer.path}.{component.name}") for component in components]
        mx.eval(parts)
        while parts:
            content = array_bytes(parts.pop(0))
            out.write(components.pop(0), content)
            advance(len(content))
    return out.finish()


def _is_quantized(model: nn.Module) -> bool:
    return any("scales" in module for _, module in model.named_modules())


def _check_free_disk(folder: Path, plan: RepackPlan) -> None:
    free = shutil.disk_usage(folder).free
    if plan.file_bytes > free:
        raise StoreError(
            f"{folder} needs {plan.file_bytes / 1e9:.1f} GB but its disk has "
            f"{free / 1e9:.1f} GB free; free some or choose another destination"
        )
