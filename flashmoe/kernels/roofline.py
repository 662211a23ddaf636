"""Bytes and operations of the expert kernels, to hold a measured time against.

Every pair counts its weights, whether or not another pair of the same call has the same expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashmoe.kernels.metal_launch import MatrixFormat


@dataclass(frozen=True)
class Traffic:
    """What one call has to move and compute; a multiply-add is two operations."""

    weight_bytes: int
    activation_bytes: int
    operations: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes

    def seconds(self, bytes_per_second: float) -> float:
        """The least time that memory of this speed allows."""
        return self.total_bytes / bytes_per_second


def gate_up_traffic(
    matrix: MatrixFormat,
    rows: int,
    cols: int,
    n_tokens: int,
    top_k: int,
    *,
    gated: bool = True,
    scale_bytes: int = 2,
    x_bytes: int = 2,
) -> Traffic:
    """expert_gate_up with matrices [rows, cols]: weights of every pair, x once per token, hidden
    in float32."""
    pairs, matrices = n_tokens * top_k, 2 if gated else 1
    bias_bytes = rows * scale_bytes if matrix.has_bias else 0
    one = matrix.weight_bytes(rows, cols, scale_bytes) + bias_bytes
    return Traffic(
        pairs * matrices * one,
        n_tokens * cols * x_bytes + pairs * rows * 4,
        2 * pairs * matrices * rows * cols,
    )


def down_traffic(
    matrix: MatrixFormat,
    rows: int,
    cols: int,
    n_tokens: int,
    top_k: int,
    *,
    scored: bool = True,
    scale_bytes: int = 2,
    y_bytes: int = 2,
) -> Traffic:
    """expert_down with matrices [rows, cols]: hidden in float32, one output per token when
    `scored`, else one per pair."""
    pairs = n_tokens * top_k
    bias_bytes = rows * scale_bytes if matrix.has_bias else 0
    outputs = n_tokens if scored else pairs
    return Traffic(
        pairs * (matrix.weight_bytes(rows, cols, scale_bytes) + bias_bytes),
        pairs * cols * 4 + outputs * rows * y_bytes + (pairs * 4 if scored else 0),
        2 * pairs * rows * cols,
    )
