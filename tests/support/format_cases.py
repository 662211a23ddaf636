"""Checkpoints as others pack them, captured from transformers (scripts/capture_formats.py)."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import mlx.core as mx

from flashmoe.base.dtypes import array_bytes
from flashmoe.checkpoint.config import read_config
from flashmoe.checkpoint.source import check_files, resolve
from flashmoe.repacking.formats.contract import Presentation
from flashmoe.repacking.formats.select import present
from tests.support.checkpoints import Tensor, file_tensors, mlx_arrays

FORMATS = Path(__file__).parents[1] / "formats"


def presentation_of(folder: Path, modules: Collection[str] | None = None) -> Presentation:
    """What mlx-lm is to see of a checkpoint, if its model has these modules."""
    checkpoint = resolve(folder)
    tensors = check_files(checkpoint)

    def read(name: str) -> bytes:
        content = bytearray(tensors[name].info.nbytes)
        file = checkpoint.weight_files[tensors[name].file]
        file.read_into(tensors[name].info.begin, memoryview(content))
        return bytes(content)

    infos = {name: tensor.info for name, tensor in tensors.items()}
    return present(folder, folder.name, read_config(folder), infos, read, modules)


def unpacked(folder: Path) -> dict[str, mx.array]:
    """The tensors that mlx-lm sees of a checkpoint, made whole."""
    return presentation_of(folder).of(mlx_arrays(folder))


def save_unpacked(folder: Path, into: Path) -> Path:
    """Writes what mlx-lm sees of a checkpoint as a checkpoint of floats."""
    into.mkdir()
    mx.save_safetensors(str(into / "model.safetensors"), unpacked(folder))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (into / "config.json").write_text(json.dumps(config))
    return into


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file of any dtypes."""
    header = {}
    offset = 0
    for name, (dtype, shape, content) in tensors.items():
        end = offset + len(content)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    parts = [
        len(text).to_bytes(8, "little"),
        text,
        *(content for _, _, content in tensors.values()),
    ]
    path.write_bytes(b"".join(parts))


def save_in_shards(folder: Path, into: Path, n_shards: int) -> Path:
    """Writes a checkpoint again, its tensors in turn to model-0.safetensors and so on."""
    into.mkdir(parents=True)
    tensors = file_tensors(folder / "model.safetensors")
    for shard in range(n_shards):
        part = {name: tensors[name] for name in sorted(tensors)[shard::n_shards]}
        save_tensors(into / f"model-{shard}.safetensors", part)
    shutil.copy(folder / "config.json", into)
    return into


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each of a checkpoint's weights as transformers unpacks it."""
    return dict(json.loads((folder / "unpacked.json").read_text()))


def digest(array: mx.array) -> str:
    mx.eval(array)
    return hashlib.sha256(array_bytes(array)).hexdigest()
