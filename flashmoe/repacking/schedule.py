"""The order of a repack: which bytes of the source become which bytes of the store, file by file.

The source is walked once, front to back, because only then can each of its files be hashed while
it passes. A piece is a few rows of a parameter: it is made when the bytes it mostly follows from
come by, and written where it belongs at once. How far a repack has come is one number of pieces.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flashmoe.checkpoint.source import SourceTensor
from flashmoe.repacking.plan import RepackPlan
from flashmoe.repacking.quantize import PACKED
from flashmoe.repacking.recipe import Setting
from flashmoe.repacking.row_graph import UnknownOperation, rows
from flashmoe.repacking.row_node import RowNode
from flashmoe.repacking.sanitize_graph import Graph
from flashmoe.store.layout import safetensors_header

# Values of a piece that needs as much of the source as its neighbours do.
MIXED_VALUES = 32 * 2**20
# Source bytes of a piece, unless a single row has more.
PIECE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class StoreFile:
    """A file of the store to be. A part is a tensor of it, or a component of one record: what has
    a CRC-32 of its own."""

    name: str
    header: bytes
    size_bytes: int
    n_parts: int


@dataclass(frozen=True)
class Sink:
    """Where rows of an array go: row r to `start + r * stride` of a store file.

    With `part_step` 0 all rows are one part, one after the other.
    """

    file: int
    start: int
    stride: int
    row_bytes: int
    part: int
    part_step: int


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model, or a weight that is packed into several: `name` is the one that
    the graph has. `sinks` are of what it becomes."""

    name: str
    n_rows: int
    sinks: tuple[Sink, ...]
    packing: Setting | None
    dtype: str

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class StorePiece:
    """Rows `begin` to `end` of a parameter, due when bytes `first` to `last` of a source file
    are there."""

    parameter: int
    begin: int
    end: int
    file: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Group:
    """Bytes `begin` to `end` of a source file, read together, with the pieces (by position) that
    are made of them."""

    begin: int
    end: int
    first_piece: int
    end_piece: int


@dataclass(frozen=True)
class Schedule:
    """`late` parameters follow from the source in a way that nobody could tell by rows.
    `last_use` says, per source file, how many pieces must be done until nobody needs it."""

    files: tuple[StoreFile, ...]
    parameters: tuple[Parameter, ...]
    pieces: tuple[StorePiece, ...]
    late: tuple[int, ...]
    last_use: tuple[int, ...]

    def first_piece(self, file: int) -> int:
        """The position of the first piece that is made of a source file or of one after it."""
        return bisect.bisect_left(self.pieces, file, key=lambda piece: piece.file)

    def has_pieces(self, file: int) -> bool:
        return self.first_piece(file) < self.first_piece(file + 1)

    def groups(self, file: int, size_bytes: int, done: int, begin: int) -> Iterator[Group]:
        """Stretches that tile a source file from byte `begin` on, of which `done` pieces are no
        more to be made; none of them cuts a piece."""
        pieces = self.pieces
        first_piece = end_piece = done
        end = begin
        while end_piece < len(pieces) and pieces[end_piece].file == file:
            position = end_piece
            first, last = pieces[position].first, pieces[position].last
            # Pieces that share bytes stay together.
            position += 1
            while position < len(pieces) and pieces[position].file == file:
                if pieces[position].first >= last:
                    break
                last = max(last, pieces[position].last)
                position += 1
            if last - begin > PIECE_BYTES and end > begin:
                yield Group(begin, end, first_piece, end_piece)
                begin, first_piece = end, end_piece
            while first - begin > PIECE_BYTES:
                yield Group(begin, begin + PIECE_BYTES, end_piece, end_piece)
                begin += PIECE_BYTES
            end, end_piece = max(end, last), position
        if end > begin:
            yield Group(begin, end, first_piece, end_piece)
        for start in range(end, size_bytes, PIECE_BYTES):
            yield Group(start, min(start + PIECE_BYTES, size_bytes), end_piece, end_piece)


def schedule(
    plan: RepackPlan, graph: Graph | None, tensors: Mapping[str, SourceTensor], n_files: int
) -> Schedule:
    """Put every row of every parameter of a plan in its place in the order of the source."""
    files, parameters = _destinations(plan)
    pieces: list[StorePiece] = []
    late = []
    elsewhere: list[tuple[StorePiece, int]] = []
    for index, parameter in enumerate(parameters):
        try:
            if graph is None:
                raise UnknownOperation("any")
            for begin, end in _blocks(graph, parameter, tensors):
                needs = [
                    span_of(leaf, tensors)
                    for leaf in rows(graph, graph.targets[parameter.name], begin, end).leaves()
                ]
                file, first, last = max(needs, key=lambda span: (span[2] - span[1], span))
                piece = StorePiece(index, begin, end, file, first, last)
                pieces.append(piece)
                elsewhere += [(piece, other) for other, _, _ in needs if other != file]
        except UnknownOperation:
            pieces = [piece for piece in pieces if piece.parameter != index]
            late.append(index)
    pieces.sort(key=lambda p: (p.file, p.first, p.last, p.parameter, p.begin))
    last_use = [0] * n_files
    for position, piece in enumerate(pieces, start=1):
        last_use[piece.file] = position
    if elsewhere:
        position_of = {piece: position for position, piece in enumerate(pieces, start=1)}
        for piece, other in elsewhere:
            if piece in position_of:
                last_use[other] = max(last_use[other], position_of[piece])
    return Schedule(files, parameters, tuple(pieces), tuple(late), tuple(last_use))


def _destinations(
    plan: RepackPlan,
) -> tuple[tuple[StoreFile, ...], tuple[Parameter, ...]]:
    files: list[StoreFile] = []
    # Of all files at once: a weight's scales may be in the next one.
    sinks: dict[str, tuple[Sink, str, int]] = {}
    for shard in plan.resident:
        header = safetensors_header(shard.tensors)
        offset = len(header)
        for part, tensor in enumerate(shard.tensors):
            n_rows = tensor.shape[0] if tensor.shape else 1
            row_bytes = tensor.nbytes // max(n_rows, 1)
            sink = Sink(len(files), offset, row_bytes, row_bytes, part, 0)
            sinks[tensor.name] = (sink, tensor.dtype, n_rows)
            offset += tensor.nbytes
        files.append(StoreFile(shard.file, header, offset, len(shard.tensors)))
    parameters = list(_parameters(sinks, plan.settings))
    for layer in plan.layers:
        n_components = len(layer.record.components)
        stride = layer.record.stride
        sinks = {
            f"{layer.path}.{c.name}": (
                Sink(len(files), layer.data_start + c.offset, stride, c.nbytes, part, n_components),
                c.dtype,
                layer.n_experts,
            )
            for part, c in enumerate(layer.record.components)
        }
        n_parts = layer.n_experts * n_components
        files.append(StoreFile(layer.file, layer.header, layer.file_bytes, n_parts))
        parameters += _parameters(sinks, plan.settings)
    return tuple(files), tuple(parameters)


def _parameters(
    sinks: dict[str, tuple[Sink, str, int]],
    settings: Mapping[str, Setting],
) -> Iterator[Parameter]:
    """One for each array, or for each weight that the source has in floats and the store packed."""
    for name, (sink, dtype, n_rows) in sinks.items():
        module, _, part = name.rpartition(".")
        packed = f"{module}.scales" in sinks and module in settings and part in PACKED
        if not packed:
            yield Parameter(name, n_rows, (sink,), None, dtype)
        elif part == "weight":
            wanted = [f"{module}.{part}" for part in PACKED]
            own = tuple(sinks[name][0] for name in wanted if name in sinks)
            yield Parameter(name, n_rows, own, settings[module], dtype)


def _blocks(
    graph: Graph, parameter: Parameter, tensors: Mapping[str, SourceTensor]
) -> Iterator[tuple[int, int]]:
    """Rows of a parameter in stretches that need about PIECE_BYTES of the source each."""
    value = graph.targets[parameter.name]
    n_rows = parameter.n_rows
    if n_rows == 0 or not any(sink.row_bytes for sink in parameter.sinks):
        return
    total = _needed(graph, value, 0, n_rows, tensors)
    # What one row needs is what all rows need where an operation mixes them; it is read once.
    if n_rows > 1 and _needed(graph, value, 0, 1, tensors) > 2 * total // n_rows:
        step = max(1, n_rows * MIXED_VALUES // max(math.prod(graph.arrays[value].shape), 1))
        for row in range(0, n_rows, step):
            yield row, min(row + step, n_rows)
        return
    step = max(1, n_rows * PIECE_BYTES // max(total, 1))
    bounds = _joints(graph, value, n_rows)
    for first, last in itertools.pairwise(bounds):
        for row in range(first, last, step):
            yield row, min(row + step, last)


def _joints(graph: Graph, value: str, n_rows: int) -> list[int]:
    """The rows at which a value goes over from one source tensor to the next."""
    return graph.joints.get(value, [0, n_rows])


def _needed(
    graph: Graph, value: str, begin: int, end: int, tensors: Mapping[str, SourceTensor]
) -> int:
    leaves = rows(graph, value, begin, end).leaves()
    return sum(last - first for _, first, last in (span_of(leaf, tensors) for leaf in leaves))


def span_of(leaf: RowNode, tensors: Mapping[str, SourceTensor]) -> tuple[int, int, int]:
    """The source file and the bytes in it of some rows of a source tensor."""
    tensor = tensors[leaf.leaf]
    info = tensor.info
    row_bytes = info.nbytes // max(info.shape[0] if info.shape else 1, 1)
    first = info.begin + leaf.begin * row_bytes
    return tensor.file, first, info.begin + leaf.end * row_bytes
