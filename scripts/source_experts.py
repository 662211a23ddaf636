"""Routed experts computed out of the checkpoint, one matrix after the other, by MLX's operations.

Shares nothing with the store, the bank and the kernels that it is held against, but where a tensor
begins in a weight file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flashmoe.base.dtypes import MLX_DTYPES, array_bytes
from flashmoe.checkpoint.source import check_files, resolve
from flashmoe.store.layout import LayerLayout, Quantization

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PARTS = ("weight", "scales", "biases")
Packed = tuple[mx.array, ...]


class ExpertSource:
    """The matrices of any expert, packed: as the checkpoint has them, or by mx.quantize."""

    def __init__(self, folder: Path) -> None:
        checkpoint = resolve(folder)
        self._files = checkpoint.weight_files
        self._tensors = check_files(checkpoint)

    def matrices(self, path: str, expert: int, packing: Quantization) -> list[Packed]:
        """Gate, up and down of an expert of the module at `path` (a name of mlx-lm's)."""
        if f"{path}.gate_proj.scales" in self._tensors:
            return [
                tuple(self._expert(f"{path}.{name}.{part}", expert) for part in PARTS)
                for name in PROJECTIONS
            ]
        own = path.replace("language_model.model.", "model.language_model.")
        own = own.replace("switch_mlp", "experts")
        fused = self._expert(f"{own}.gate_up_proj", expert)
        half = fused.shape[0] // 2
        floats = [fused[:half], fused[half:], self._expert(f"{own}.down_proj", expert)]
        return [mx.quantize(matrix, packing.group_size, packing.bits) for matrix in floats]

    def record(self, layout: LayerLayout, expert: int) -> dict[str, memoryview]:
        """The components of an expert's record, by name."""
        packing = layout.projections["gate_proj"]
        matrices = self.matrices(layout.path, expert, packing)
        return {
            f"{name}.{part}": array_bytes(array)
            for name, matrix in zip(PROJECTIONS, matrices, strict=True)
            for part, array in zip(PARTS, matrix, strict=True)
        }

    def _expert(self, name: str, expert: int) -> mx.array:
        tensor = self._tensors[name]
        size_bytes = tensor.info.nbytes // tensor.info.shape[0]
        content = np.empty(size_bytes, np.uint8)
        self._files[tensor.file].read_into(tensor.info.begin + expert * size_bytes, content.data)
        return mx.array(content).view(MLX_DTYPES[tensor.info.dtype]).reshape(tensor.info.shape[1:])


class SourceExperts(nn.Module):
    """Takes the place of a SwitchGLU: `x` [..., d], `indices` [..., k] -> [..., k, d]."""

    def __init__(self, source: ExpertSource, path: str, packing: Quantization) -> None:
        super().__init__()
        self._source = source
        self._path = path
        self._packing = packing

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        experts = np.array(indices)
        routed = experts.reshape(-1, experts.shape[-1])
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        y = np.zeros((*routed.shape, x.shape[-1]), np.float32)
        for expert in np.unique(routed):
            tokens, places = np.nonzero(routed == expert)
            gate, up, down = self._source.matrices(self._path, int(expert), self._packing)
            taken = rows[mx.array(tokens)]
            hidden = nn.silu(self._product(taken, gate)) * self._product(taken, up)
            y[tokens, places] = np.array(self._product(hidden, down))
        return mx.array(y).reshape(*experts.shape, x.shape[-1]).astype(x.dtype)

    def _product(self, x: mx.array, matrix: Packed) -> mx.array:
        weight, scales, biases = matrix
        return mx.quantized_matmul(
            x,
            weight,
            scales.astype(mx.float32),
            biases.astype(mx.float32),
            group_size=self._packing.group_size,
            bits=self._packing.bits,
        )


class NoExperts(nn.Module):
    """Takes the place of a SwitchGLU whose experts give zeros."""

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return mx.zeros((*indices.shape, x.shape[-1]), x.dtype)


def put_in_place(model: nn.Module, path: str, module: nn.Module) -> None:
    """Have `module` at `path` of a model."""
    parent: Any = model
    *above, name = path.split(".")
    for part in above:
        parent = parent[int(part)] if isinstance(parent, list) else getattr(parent, part)
    setattr(parent, name, module)
