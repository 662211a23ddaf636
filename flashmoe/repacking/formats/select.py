"""Which format a checkpoint is packed in."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from flashmoe.base.dtypes import MLX_DTYPES
from flashmoe.base.errors import SourceError
from flashmoe.checkpoint.config import Config
from flashmoe.checkpoint.headers import TensorInfo
from flashmoe.repacking.formats.awq import AWQ
from flashmoe.repacking.formats.bitsandbytes import BITSANDBYTES
from flashmoe.repacking.formats.compressed import COMPRESSED
from flashmoe.repacking.formats.contract import AS_IT_IS, Format, Packed, Presentation, levels
from flashmoe.repacking.formats.fp8 import FP8, SCALES
from flashmoe.repacking.formats.gptq import GPTQ
from flashmoe.repacking.formats.modelopt import MODELOPT


def _as_it_is(packed: Packed) -> Presentation:
    return AS_IT_IS


def _mxfp8(packed: Packed) -> Presentation:
    """By others than MLX, with scales beside the weights' names, it is fp8."""
    is_named = any(name.endswith(SCALES) for name in packed.tensors)
    return FP8.present(packed) if is_named else AS_IT_IS


# What each reads of a checkpoint is for itself to say.
FORMATS: tuple[Format, ...] = (
    FP8,
    Format("mxfp4 (as gpt-oss has it)", ("mxfp4",), _as_it_is),
    Format("mxfp8", ("mxfp8",), _mxfp8),
    AWQ,
    GPTQ,
    BITSANDBYTES,
    MODELOPT,
    COMPRESSED,
)
# Files in which packages state settings that config.json lacks, and which need not name the method.
OWN_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
# Dtypes that MLX loads as what they are, and those that it loads as bytes.
READ = tuple(name for name in MLX_DTYPES if name != "F64")
READ_AS_BYTES = ("F8_E4M3", "F8_E8M0")


def present(
    folder: Path,
    where: str,
    config: Config,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], bytes],
    modules: Collection[str] | None = None,
) -> Presentation:
    """What mlx-lm is to see of a checkpoint with these tensors, the bytes of which `read` gives,
    and this config, whose small files are in `folder`. `modules` as in Packed.

    Raises SourceError, which names `where`, for a format that nobody here reads.
    """
    settings = quantization_of(folder, config)
    packed = Packed(where, settings, config, tensors, read, modules)
    # What MLX packed is for mlx-lm to read.
    chosen = None if config.get("quantization") else _format_of(packed)
    presentation = chosen.present(packed) if chosen is not None else AS_IT_IS
    readable = READ if chosen is None else (*READ, *READ_AS_BYTES)
    for name, info in tensors.items():
        if name not in presentation.hidden and info.dtype not in readable:
            raise SourceError(
                f"{name} of {where} has dtype {info.dtype}, which flashmoe does not read; "
                f"it reads {known()}"
            )
    return presentation


def quantization_of(folder: Path, config: Config) -> Mapping[str, Any]:
    """A checkpoint's `quantization_config`, wherever it states one; nothing if it does not."""
    for level in levels(config):
        for key in ("quantization_config", "compression_config"):
            if isinstance(level.get(key), dict):
                return dict(level[key])
    for name, method in OWN_FILES.items():
        try:
            stated = json.loads((folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(stated, dict):
            return {"quant_method": method, **stated}
    return {}


def known() -> str:
    """The formats that checkpoints may be in, for a message."""
    return ", ".join(["floats", "MLX", *(listed.words for listed in FORMATS)])


def _format_of(packed: Packed) -> Format | None:
    """The format of a checkpoint, or None for floats."""
    method = packed.settings.get("quant_method")
    for candidate in FORMATS:
        if method in candidate.methods:
            return candidate
        endings = candidate.endings
        if not packed.settings and endings and any(n.endswith(endings) for n in packed.tensors):
            return candidate
    if not packed.settings:
        return None
    how = "does not say how it is packed" if method is None else f"is packed as {method}"
    raise SourceError(f"{packed.where} {how}, which flashmoe does not read; it reads {known()}")
