"""The bytes of a piece of the store, out of the bytes of the source."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from flashmoe.base.dtypes import MLX_DTYPES, array_bytes
from flashmoe.base.errors import SourceError
from flashmoe.checkpoint.files import SourceFile
from flashmoe.checkpoint.source import SourceTensor
from flashmoe.repacking.quantize import pack
from flashmoe.repacking.recipe import Setting
from flashmoe.repacking.row_graph import rows
from flashmoe.repacking.row_node import RowNode
from flashmoe.repacking.sanitize_graph import Graph
from flashmoe.repacking.schedule import Parameter, StorePiece, span_of

# Of what is asked for out of turn (scales of what comes by), this much is remembered.
REMEMBERED_BYTES = 32 * 2**20
WINDOW_BYTES = 64 * 2**10
# Weights that begin with so many zeros are looked at whole.
PROBE_BYTES = 64


class Maker:
    """Makes pieces of a schedule over one source."""

    def __init__(
        self, graph: Graph, tensors: Mapping[str, SourceTensor], files: Sequence[SourceFile]
    ) -> None:
        self._graph = graph
        self._tensors = tensors
        self._files = files
        self._zeros: dict[tuple[tuple[int, ...], mx.Dtype, Setting], list[memoryview]] = {}
        self._warm_start_file: OrderedDict[tuple[int, int, int], memoryview] = OrderedDict()

    def make(
        self, parameter: Parameter, piece: StorePiece, begin: int, here: memoryview
    ) -> list[memoryview]:
        """What goes into each sink of `parameter`; `here` is what the piece's source file has
        from byte `begin` on. Raises SourceError when other bytes that are needed cannot be read.
        """

        def read(leaf: RowNode) -> memoryview:
            file, first, last = span_of(leaf, self._tensors)
            if file == piece.file and begin <= first and last <= begin + len(here):
                return here[first - begin : last - begin]
            return self._fetch(file, first, last)

        step = rows(self._graph, self._graph.targets[parameter.name], piece.begin, piece.end)
        if step.is_plain and parameter.packing is None and self._keeps_dtype(parameter):
            return [read(next(step.leaves()))]
        try:
            result = step.evaluate(lambda leaf: self._array(leaf, read(leaf)), checked=True)
            if parameter.packing is not None:
                return self._packed(result, parameter.packing)
            return [array_bytes(result.astype(MLX_DTYPES[parameter.dtype]))]
        except (RuntimeError, ValueError) as error:
            raise SourceError(f"{parameter.name} cannot be made of its tensors: {error}") from error

    def _packed(self, weight: mx.array, setting: Setting) -> list[memoryview]:
        """`pack`, but of the zeros of a sparse source only one of each shape."""
        zeros = None
        content = np.frombuffer(array_bytes(weight), np.uint8)
        if not content[:PROBE_BYTES].any() and not content.any():
            zeros = (weight.shape, weight.dtype, setting)
            if zeros in self._zeros:
                return self._zeros[zeros]
        parts = list(pack(weight, setting).values())
        mx.eval(parts)
        packed = [array_bytes(part) for part in parts]
        if zeros is not None:
            self._zeros[zeros] = packed
        return packed

    def _keeps_dtype(self, parameter: Parameter) -> bool:
        value = self._graph.targets[parameter.name]
        return self._graph.arrays[value].dtype == parameter.dtype

    def _array(self, leaf: RowNode, content: memoryview) -> mx.array:
        info = self._tensors[leaf.leaf].info
        shape = (leaf.end - leaf.begin, *info.shape[1:]) if info.shape else ()
        dtype = MLX_DTYPES.get(info.dtype, mx.uint8)
        flat = mx.array(np.frombuffer(content, np.uint8))
        return flat.view(dtype).reshape(shape)

    def _fetch(self, file: int, first: int, last: int) -> memoryview:
        """Bytes of a source file, with what lies around them if they are few: where one is
        needed out of turn, its neighbours soon are, and a Hub answers in milliseconds."""
        begin, end = first, last
        if last - first < WINDOW_BYTES:
            begin -= begin % WINDOW_BYTES
            end = min(end + -end % WINDOW_BYTES, self._files[file].size_bytes)
        content = self._warm_start_file.get((file, begin, end))
        if content is not None:
            self._warm_start_file.move_to_end((file, begin, end))
        else:
            content = np.empty(end - begin, np.uint8).data
            self._files[file].read_into(begin, content)
            self._warm_start_file[file, begin, end] = content
            while sum(map(len, self._warm_start_file.values())) > REMEMBERED_BYTES:
                self._warm_start_file.popitem(last=False)
        return content[first - begin : last - begin]
