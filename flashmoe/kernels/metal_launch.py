"""Shapes of the Metal kernels: formats, grids and template arguments. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from flashmoe.kernels.metal_source import EXPERT_DOWN, EXPERT_GATE_UP, KernelSource

# As in metal/packing.h.
FORMATS = {"affine": 0, "mxfp4": 1, "float32": 2, "float16": 3, "bfloat16": 4}
BLOCK = 32
FLOAT_VALUES = 8
# As in metal/activation.h; a limit that there is not is the largest float.
ACTIVATIONS = {"sigmoid": 0, "gelu_tanh": 1, "relu2": 2, "situ": 3}
NO_LIMIT = 3.4e38
# As in metal/rows.h.
SIMD_WIDTH = 32
SIMDGROUPS = 4
ROWS = 4

# A row shorter than a SIMD group's reach is shared by fewer lanes, when more are busy that way.
LANES = (32, 16, 8)
BUSY = 0.9

Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class MatrixFormat:
    """How a projection's weights are packed: `kind` is a key of FORMATS.

    Floats have 16 or 32 bits and no group size.
    """

    kind: str
    bits: int
    group_size: int
    has_bias: bool

    @property
    def values(self) -> int:
        """Values that a lane takes at a time."""
        return BLOCK if self.kind in ("affine", "mxfp4") else FLOAT_VALUES

    @property
    def alignment(self) -> int:
        """What the weights' address has to be a multiple of, in bytes.

        The widest load that divides a unit's bytes; rows and slots are whole units, so nothing
        else has to be aligned.
        """
        unit_bytes = self.values * self.bits // 8
        return next(width for width in (16, 8, 4) if unit_bytes % width == 0)

    def weight_bytes(self, rows: int, cols: int, scale_bytes: int) -> int:
        """Bytes of one matrix with its scales and quantization biases."""
        packed = rows * cols * self.bits // 8
        if self.group_size == 0:
            return packed
        per_group = 1 if self.kind == "mxfp4" else 2 * scale_bytes
        return packed + rows * (cols // self.group_size) * per_group


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: threads, template arguments, the shape of its output."""

    kernel: KernelSource
    grid: Sizes
    threadgroup: Sizes
    template: tuple[tuple[str, int | bool], ...]
    output_shape: tuple[int, int]


def covers(mode: str, bits: int, group_size: int) -> bool:
    """Whether the kernels multiply weights packed so."""
    if mode == "mxfp4":
        return (bits, group_size) == (4, 32)
    return mode == "affine" and bits in (2, 3, 4, 5, 6, 8) and group_size in (32, 64, 128)


def lanes_per_row(cols: int, values: int) -> int:
    """How many lanes share a row: the most of which 90 % have something to do, or the busiest."""
    units = -(-cols // values)
    busy = {lanes: units / (-(-units // lanes) * lanes) for lanes in LANES}
    return next((lanes for lanes in LANES if busy[lanes] >= BUSY), max(LANES, key=busy.__getitem__))


def gate_up_launch(
    matrix: MatrixFormat, rows: int, cols: int, n_tokens: int, top_k: int, gated: bool
) -> Launch:
    """hidden [n_tokens * top_k, rows] from x [n_tokens, cols]."""
    pairs = n_tokens * top_k
    return _launch(EXPERT_GATE_UP, matrix, rows, cols, pairs, (("GATED", gated),), pairs)


def down_launch(
    matrix: MatrixFormat, rows: int, cols: int, n_tokens: int, top_k: int, scored: bool
) -> Launch:
    """y [n_tokens, rows] when `scored`, else [n_tokens * top_k, rows]."""
    outputs = n_tokens if scored else n_tokens * top_k
    return _launch(EXPERT_DOWN, matrix, rows, cols, outputs, (("SCORED", scored),), outputs)


def _launch(
    kernel: KernelSource,
    matrix: MatrixFormat,
    rows: int,
    cols: int,
    grid_y: int,
    switches: tuple[tuple[str, bool], ...],
    outputs: int,
) -> Launch:
    lanes = lanes_per_row(cols, matrix.values)
    rows_per_group = SIMDGROUPS * (SIMD_WIDTH // lanes) * ROWS
    threads = SIMDGROUPS * SIMD_WIDTH
    return Launch(
        kernel,
        grid=(-(-rows // rows_per_group) * threads, grid_y, 1),
        threadgroup=(threads, 1, 1),
        template=(
            *switches,
            ("LANES", lanes),
            ("FORMAT", FORMATS[matrix.kind]),
            ("BITS", matrix.bits),
            # Nothing is divided by the group size of floats, but it has to compile.
            ("GROUP", matrix.group_size or BLOCK),
            ("HAS_BIAS", matrix.has_bias),
        ),
        output_shape=(outputs, rows),
    )
