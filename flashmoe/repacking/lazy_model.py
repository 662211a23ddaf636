"""The mlx-lm model of a checkpoint whose tensors nobody has read yet."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import load_model

from flashmoe.base.errors import SourceError
from flashmoe.checkpoint.architecture import build_model, model_classes
from flashmoe.checkpoint.config import Config, read_config
from flashmoe.checkpoint.headers import TensorInfo
from flashmoe.checkpoint.source import Checkpoint
from flashmoe.checkpoint.weights import Weights, adapting
from flashmoe.repacking.formats.contract import Presentation
from flashmoe.repacking.formats.select import present
from flashmoe.repacking.sanitize_graph import Graph, trace


@dataclass(frozen=True)
class Loaded:
    """A model with arrays that are read when they are evaluated, and how its parameters follow
    from the source's tensors (None when that cannot be told without reading them).

    Unless `is_whole`, arrays must not be evaluated: they have shapes and dtypes alone.
    """

    model: nn.Module
    config: Config
    graph: Graph | None
    is_whole: bool


def load_lazily(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], bytes],
    *,
    outlined: bool,
    whole: bool = False,
) -> Loaded:
    """The checkpoint's mlx-lm model, nothing evaluated, its tensors as their format presents them.
    `read` gives the bytes of a tensor, which some formats state shapes in.

    `outlined` loads a file that has `tensors` as its header and no data instead of the
    checkpoint's own, which need not be there then. What a format presents has values if the model
    is to be `whole`, which takes a graph of operations for each of many tensors.
    Raises SourceError when the format is not known, or when the config or the tensors are not
    what the family expects.
    """
    stated = read_config(checkpoint.folder)
    model, config = build_model(stated)
    modules = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    presentation = present(checkpoint.folder, checkpoint.where, stated, tensors, read, modules)
    config.update(presentation.config)
    if config.get("quantize_activations"):
        raise SourceError(
            f"{checkpoint.repo} quantizes activations, which streamed experts do not support"
        )
    model_class, args_class = model_classes(config)
    traced = _Traced(adapting(model_class), presentation, whole)
    with tempfile.TemporaryDirectory(prefix="flashmoe-") as scratch:
        folder = checkpoint.folder
        if outlined:
            folder = Path(scratch)
            _outline(folder, tensors)
            for path in checkpoint.folder.glob("*config.json"):
                (folder / path.name).write_bytes(path.read_bytes())
        try:
            model, config = load_model(
                folder,
                lazy=True,
                model_config=config,
                get_model_classes=lambda config: (traced.model_class, args_class),
            )
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            # mlx-lm names the tensors on the lines after the first.
            reason = " ".join(line.strip() for line in lines[:2])[:300]
            raise SourceError(
                f"{checkpoint.repo} is not a {config['model_type']} checkpoint that mlx-lm can "
                f"load: {reason}"
            ) from error
    is_whole = not outlined and (whole or not presentation.stand_ins)
    return Loaded(model, config, traced.graph, is_whole)


class _Traced:
    """A model class whose `sanitize` is given what a format presents, and leaves its graph here."""

    def __init__(
        self, model_class: type[nn.Module], presentation: Presentation, whole: bool
    ) -> None:
        self.graph: Graph | None = None

        def sanitize(model: nn.Module, weights: Weights) -> Weights:
            inherited: Any = super(self.model_class, model)
            presented = presentation.of(weights) if whole else presentation.outline(weights)
            self.graph = trace(inherited.sanitize, presented, presentation.stand_ins)
            result: Weights = inherited.sanitize(presented)
            return result

        self.model_class = type(model_class.__name__, (model_class,), {"sanitize": sanitize})


def _outline(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """A safetensors file with a header and a hole for data."""
    header: dict[str, object] = {}
    offset = 0
    for name, info in tensors.items():
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
