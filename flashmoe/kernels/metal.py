"""Routed experts through the Metal kernels, for the few rows of a decode step.

expert_gate_up: hidden[p] = activation(Wg x, Wu x) for every (token, chosen expert) pair p. With
matrices [N, d], a pair moves 2 N d (bits + 32 / group_size) / 8 bytes of weights (16-bit scales
and biases) and 4 N bytes of output, a token d activations; a pair takes 4 N d operations.
expert_down: y = score * (Wd hidden), summed over a token's experts or not: half the weights and
operations of a pair, 4 N bytes in, d activations out. `roofline` computes both.

Qwen3.5-397B at 4 bits, group 64 (d 4096, N 1024, top-10), per token and layer: expert_gate_up
47.2 MB and 168 M operations, expert_down 23.6 MB and 84 M. That is 3.6 operations per byte, a
tenth of what would keep an Apple GPU computing: bytes bound both kernels. 60 layers make 4.25 GB
per token, so 400 GB/s allow 94 tokens/s for the experts alone.

More rows go to one product per expert (`grouped`); what the kernels do not cover goes to the
reference: nvfp4, mxfp8, activations that `recognize` does not know, gate and up packed in
different ways, floats whose rows are not a multiple of 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flashmoe.kernels import grouped, reference
from flashmoe.kernels.contract import ExpertForward, ExpertSpec, Slots
from flashmoe.kernels.metal_experts import (
    FLOATS,
    LEAST_ELEMENTS,
    ExpertMatrices,
    Projection,
    describe_experts,
)
from flashmoe.kernels.metal_launch import (
    ACTIVATIONS,
    NO_LIMIT,
    Launch,
    down_launch,
    gate_up_launch,
)
from flashmoe.kernels.metal_source import build
from flashmoe.native import Activation

# Calls with more rows are a prompt's.
DECODE_TOKENS = 8


def available() -> str | None:
    """Why the kernels cannot run here; None when they can."""
    if not mx.metal.is_available():
        return "MLX has no Metal on this machine"
    return "MLX was told to compute on the CPU" if mx.default_device() == mx.cpu else None


def covers_experts(weights: Mapping[str, mx.array], spec: ExpertSpec) -> bool:
    """Whether decode steps over this bank go to the kernels, rather than to the reference."""
    return describe_experts(weights, spec) is not None


def bind_experts(weights: Mapping[str, mx.array], spec: ExpertSpec) -> ExpertForward:
    """Routed experts over these weights; see `contract.ExpertKernel`. Unevaluated."""
    twin = reference.bind_experts(weights, spec)
    experts = describe_experts(weights, spec)
    if experts is None:
        return twin
    prompt = grouped.bind_experts(weights, spec)

    def forward(x: mx.array, slots: Slots) -> mx.array:
        n_tokens = math.prod(x.shape[:-1])
        if n_tokens == 0 or x.dtype not in FLOATS:
            return twin(x, slots)
        if n_tokens > DECODE_TOKENS:
            return prompt(x, slots)
        routing = RoutedSlots.of(slots)
        y = expert_down(expert_gate_up(x, routing, experts), routing, experts, x.dtype)
        return y.reshape(*slots.shape, y.shape[-1])

    return forward


def bind_prompts(weights: Mapping[str, mx.array], spec: ExpertSpec) -> ExpertForward:
    """One product per expert however few rows a call has; see `select.select_prompt_kernel`."""
    twin = reference.bind_experts(weights, spec)
    if describe_experts(weights, spec) is None:
        return twin
    prompt = grouped.bind_experts(weights, spec)

    def forward(x: mx.array, slots: Slots) -> mx.array:
        return prompt(x, slots) if slots.size and x.dtype in FLOATS else twin(x, slots)

    return forward


@dataclass(frozen=True)
class RoutedSlots:
    """Slots [n_tokens * top_k] int32 as the kernels read them; MLX needs a few more of them
    where they are few."""

    slots: mx.array
    n_tokens: int
    top_k: int

    @classmethod
    def of(cls, slots: Slots) -> RoutedSlots:
        """From slots [..., top_k] on the host."""
        flat = np.zeros(max(slots.size, LEAST_ELEMENTS), np.int32)
        flat[: slots.size] = slots.reshape(-1)
        return cls(mx.array(flat), slots.size // slots.shape[-1], slots.shape[-1])


def expert_gate_up(x: mx.array, routing: RoutedSlots, experts: ExpertMatrices) -> mx.array:
    """hidden [n_tokens * top_k, N] float32 from x [..., d_in] with n_tokens rows."""
    up, gate = experts.up, experts.gate
    launch = gate_up_launch(
        up.format, up.rows, up.cols, routing.n_tokens, routing.top_k, gate is not None
    )
    sizes = _sizes(up, routing.top_k, ACTIVATIONS[experts.activation.kind])
    inputs = [x.reshape(-1, up.cols), routing.slots, sizes, _limits(experts.activation)]
    return _run(launch, [*inputs, *(gate or up).arrays, *up.arrays], mx.float32)


def expert_down(
    hidden: mx.array,
    routing: RoutedSlots,
    experts: ExpertMatrices,
    dtype: mx.Dtype,
    scores: mx.array | None = None,
) -> mx.array:
    """[n_tokens * top_k, d_out] from hidden [n_tokens * top_k, N] float32; with scores
    [..., top_k] the weighted sums over a token's experts, [n_tokens, d_out]."""
    down = experts.down
    launch = down_launch(
        down.format, down.rows, down.cols, routing.n_tokens, routing.top_k, scores is not None
    )
    # Without scores they are not read.
    factors = hidden if scores is None else _scores(scores)
    inputs = [hidden, routing.slots, factors, _sizes(down, routing.top_k)]
    return _run(launch, [*inputs, *down.arrays], dtype)


def _run(launch: Launch, inputs: list[mx.array], dtype: mx.Dtype) -> mx.array:
    (output,) = build(launch.kernel)(
        inputs=inputs,
        template=list(launch.template),
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=[launch.output_shape],
        output_dtypes=[dtype],
    )
    return output


def _sizes(part: Projection, top_k: int, activation: int = 0) -> mx.array:
    """In the order of metal/rows.h."""
    return mx.array([part.rows, part.cols, top_k, activation], mx.int32)


def _limits(activation: Activation) -> mx.array:
    """In the order of metal/activation.h."""
    numbers = (
        activation.alpha,
        activation.gate_max,
        activation.activated_max,
        activation.up_max,
        activation.up_bound,
        activation.up_shift,
    )
    return mx.array([min(number, NO_LIMIT) for number in numbers], mx.float32)


def _scores(scores: mx.array) -> mx.array:
    flat = scores.reshape(-1).astype(mx.float32)
    missing = LEAST_ELEMENTS - flat.size
    return mx.pad(flat, (0, missing)) if missing > 0 else flat
