"""The file that `record` writes: which experts each token was routed to.

A safetensors file. Its `__metadata__` has one key, `flashmoe_trace`, a JSON object:

    {"version": 1, "model": "qwen3_moe",
     "layers": [{"path": ..., "n_experts": 32, "top_k": 2, "record_bytes": 98304}, ...]}

and its tensors are, a step being one forward pass,

    experts      U16 [tokens, sum of top_k]   routed experts, the layers side by side in order
    step_tokens  U32 [steps]                  tokens of each step: 1, or a chunk of a prompt
    step_prompt  U32 [steps]                  which prompt, from 0

Tokens are in the order in which they were fed, prompts and answers alike.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from flashmoe.base.errors import OptionError, SourceError
from flashmoe.checkpoint.headers import TensorInfo, read_header

VERSION = 1
KEY = "flashmoe_trace"
Routed = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class TracedLayer:
    """One MoE layer of the model that was traced."""

    path: str
    n_experts: int
    top_k: int
    record_bytes: int


@dataclass(frozen=True)
class Trace:
    """A recorded trace; arrays as the file has them."""

    model: str
    layers: tuple[TracedLayer, ...]
    experts: Routed
    step_tokens: npt.NDArray[np.uint32]
    step_prompt: npt.NDArray[np.uint32]

    @property
    def prompts(self) -> int:
        """How many prompts were answered."""
        return len(np.unique(self.step_prompt))

    def routed(self, layer: int) -> Routed:
        """One layer's experts [tokens, top_k] uint16."""
        first = sum(before.top_k for before in self.layers[:layer])
        return self.experts[:, first : first + self.layers[layer].top_k]


class TraceWriter:
    """Writes a trace as it is recorded; the file appears when it is complete.

    Keeps 8 bytes per step in memory, and the rest on disk. Leaving the block by an exception
    leaves nothing behind.
    """

    def __init__(self, path: Path, model: str, layers: Sequence[TracedLayer]) -> None:
        """Raises OptionError for a model whose expert numbers do not fit, and OSError."""
        if max(layer.n_experts for layer in layers) > 2**16:
            raise OptionError("a trace holds at most 65,536 experts per layer")
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._described = {
            KEY: json.dumps(
                {"version": VERSION, "model": model, "layers": [asdict(x) for x in layers]}
            )
        }
        self._columns = sum(layer.top_k for layer in layers)
        self._tokens = 0
        self._step_tokens = array("I")
        self._step_prompt = array("I")
        # Room for the largest counts that can come.
        self._header_bytes = -(-len(self._header(2**50, 2**50)) // 8) * 8
        self._file = self._partial.open("wb")
        self._file.write(bytes(8 + self._header_bytes))

    def add_step(self, prompt: int, experts: Routed) -> None:
        """One forward pass: `experts` [tokens, sum of top_k] uint16 of this prompt's tokens."""
        self._file.write(np.ascontiguousarray(experts, "<u2").data)
        self._tokens += len(experts)
        self._step_tokens.append(len(experts))
        self._step_prompt.append(prompt)

    def finish(self) -> None:
        """Complete the file and put it in place."""
        for column in (self._step_tokens, self._step_prompt):
            self._file.write(np.asarray(column, "<u4").data)
        header = self._header(self._tokens, len(self._step_tokens))
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little"))
        self._file.write(header.ljust(self._header_bytes))
        self._file.close()
        self._partial.replace(self._path)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _header(self, tokens: int, steps: int) -> bytes:
        entries: dict[str, Any] = {"__metadata__": self._described}
        begin = 0
        for name, dtype, shape, item_bytes in (
            ("experts", "U16", [tokens, self._columns], 2),
            ("step_tokens", "U32", [steps], 4),
            ("step_prompt", "U32", [steps], 4),
        ):
            end = begin + item_bytes * int(np.prod(shape, dtype=object))
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            begin = end
        return json.dumps(entries, separators=(",", ":")).encode()


def read_trace(path: Path) -> Trace:
    """A trace, its experts mapped from the file rather than read at once.

    Raises SourceError for what is missing, damaged, or no trace of this version.
    """
    tensors = read_header(path)
    model, layers = _description(path)
    wanted = {"experts": ("U16", 2), "step_tokens": ("U32", 1), "step_prompt": ("U32", 1)}
    found = {name: (tensor.dtype, len(tensor.shape)) for name, tensor in tensors.items()}
    if found != wanted:
        raise SourceError(f"{path} is a damaged trace: its tensors are {found}; record it again")
    trace = Trace(
        model,
        layers,
        _experts(path, tensors["experts"]),
        _counts(path, tensors["step_tokens"]),
        _counts(path, tensors["step_prompt"]),
    )
    problem = _problem(trace)
    if problem is not None:
        raise SourceError(f"{path} is a damaged trace: {problem}; record it again")
    return trace


def _description(path: Path) -> tuple[str, tuple[TracedLayer, ...]]:
    """The metadata of a file whose header is known to be well formed."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(length)).get("__metadata__")
    if not isinstance(metadata, dict) or KEY not in metadata:
        raise SourceError(f"{path} is no trace: record one with scripts/routing_traces")
    try:
        stated = json.loads(metadata[KEY])
        if stated["version"] != VERSION:
            raise SourceError(
                f"{path} is a trace of version {stated['version']}, and this flashmoe reads "
                f"version {VERSION}; record it again"
            )
        layers = tuple(TracedLayer(**layer) for layer in stated["layers"])
        model = str(stated["model"])
    except (KeyError, TypeError, ValueError, RecursionError):
        raise SourceError(f"{path} is a damaged trace: its description cannot be read") from None
    for layer in layers:
        counts = (layer.n_experts, layer.top_k, layer.record_bytes)
        if not all(type(count) is int and count > 0 for count in counts):
            raise SourceError(f"{path} is a damaged trace: a layer of {counts}")
        if layer.top_k > layer.n_experts:
            raise SourceError(f"{path} is a damaged trace: {layer.top_k} of {layer.n_experts}")
    return model, layers


def _experts(path: Path, tensor: TensorInfo) -> Routed:
    if tensor.size == 0:
        return np.zeros(tensor.shape, np.uint16)
    return np.memmap(path, "<u2", "r", tensor.begin, tensor.shape)


def _counts(path: Path, tensor: TensorInfo) -> npt.NDArray[np.uint32]:
    return np.fromfile(path, "<u4", tensor.size, offset=tensor.begin).astype(np.uint32)


def _problem(trace: Trace) -> str | None:
    """What contradicts itself in a trace, or None."""
    tokens, columns = trace.experts.shape
    if tokens == 0 or not trace.layers:
        return "it is empty"
    if columns != sum(layer.top_k for layer in trace.layers):
        return f"{columns} experts per token are not what its layers route to"
    if len(trace.step_tokens) != len(trace.step_prompt):
        return "its steps are of different numbers"
    if int(trace.step_tokens.sum(dtype=np.int64)) != tokens or not trace.step_tokens.all():
        return f"its steps do not add up to {tokens} tokens"
    for i, layer in enumerate(trace.layers):
        if int(trace.routed(i).max()) >= layer.n_experts:
            return f"{layer.path} has an expert beyond {layer.n_experts}"
    return None
