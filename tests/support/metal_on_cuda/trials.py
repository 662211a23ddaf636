"""Which experts are tried, what flashmoe asks for them, and what float64 says to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe.kernels import metal
from flashmoe.kernels.check_cases import BITS, make_case, standard_cases
from flashmoe.kernels.contract import ProjectionPacking
from flashmoe.kernels.metal_experts import ExpertMatrices, describe_experts
from flashmoe.kernels.roofline import Traffic, down_traffic, gate_up_traffic
from flashmoe.kernels.self_check import TOLERANCES, Case
from flashmoe.native import Activation
from tests.support.metal_on_cuda.exact import Floats, down_in_float64, hidden_in_float64
from tests.support.metal_on_cuda.requests import Request, recorded

N_SLOTS = 3
FOUR = ProjectionPacking(4, 64, "affine")
MXFP4 = ProjectionPacking(4, 32, "mxfp4")
GPT_OSS = Activation("sigmoid", 1.702, gate_max=7.0, up_max=7.0, up_shift=1.0)

# (tokens, top-k), walked through by the small trials.
_CALLS = ((1, 1), (1, 10), (8, 1), (2, 3), (1, 8), (3, 2), (5, 1), (1, 4), (7, 1), (2, 5))


@dataclass(frozen=True)
class Question:
    """A call of a kernel, its output in float64, and what it moves."""

    kernel: str
    request: Request
    expected: Floats
    traffic: Traffic

    @property
    def tolerance(self) -> float:
        """Of a row's norm."""
        return TOLERANCES[self.request.output_dtype]


@dataclass(frozen=True)
class Trial:
    """ExpertMatrices, and how many tokens and experts a call of them has."""

    label: str
    case: Case
    n_tokens: int
    top_k: int
    in_order: bool = False

    @property
    def n_pairs(self) -> int:
        return self.n_tokens * self.top_k

    @property
    def slots(self) -> npt.NDArray[np.int32]:
        """[n_tokens, top_k], in any order and repeated, or 0, 1, 2, 0, ... where `in_order`."""
        shape = (self.n_tokens, self.top_k)
        if self.in_order:
            return (np.arange(self.n_pairs, dtype=np.int32) % N_SLOTS).reshape(shape)
        return np.random.default_rng(shape).integers(0, N_SLOTS, shape, np.int32)

    def requests(self) -> list[Request]:
        """The questions without their answers: enough to compile for."""
        return [question.request for question in self._questions(exact=False)]

    def questions(self) -> list[Question]:
        """expert_gate_up, expert_down, and expert_down summed over a token's experts."""
        return self._questions(exact=True)

    def _questions(self, exact: bool) -> list[Question]:
        case, slots = self.case, self.slots
        weights = case.random_weights(N_SLOTS)
        rng = np.random.default_rng([self.n_tokens, self.top_k, case.d_in])
        x = mx.array(rng.standard_normal((self.n_tokens, case.d_in), np.float32))
        x = x.astype(case.dtype)
        scores = rng.uniform(0.1, 1.0, slots.shape).astype(np.float32)
        with recorded() as requests:
            experts = describe_experts(weights, case.spec)
            assert experts is not None, f"{self.label} is not covered"
            width = experts.down.cols
            hidden = rng.standard_normal((self.n_pairs, width), np.float32)
            routing = metal.RoutedSlots.of(slots)
            metal.expert_gate_up(x, routing, experts)
            metal.expert_down(mx.array(hidden), routing, experts, case.dtype)
            metal.expert_down(mx.array(hidden), routing, experts, case.dtype, mx.array(scores))
        expected = [np.empty(0)] * 3
        if exact:
            down = down_in_float64(case, weights, hidden.astype(np.float64), slots)
            summed = np.einsum("tkd,tk->td", down.reshape(*slots.shape, -1), scores)
            expected = [hidden_in_float64(case, weights, x, slots), down, summed]
        names = ("expert_gate_up", "expert_down", "expert_down, summed")
        moved = self._traffic(experts)
        return [Question(*of) for of in zip(names, requests, expected, moved, strict=True)]

    def _traffic(self, experts: ExpertMatrices) -> Iterator[Traffic]:
        up, down, size = experts.up, experts.down, self.case.dtype.size
        call = (self.n_tokens, self.top_k)
        yield gate_up_traffic(
            up.format, up.rows, up.cols, *call,
            gated=experts.gate is not None, scale_bytes=up.arrays[3].itemsize, x_bytes=size,
        )  # fmt: skip
        for scored in (False, True):
            yield down_traffic(
                down.format, down.rows, down.cols, *call,
                scored=scored, scale_bytes=down.arrays[3].itemsize, y_bytes=size,
            )  # fmt: skip


def small_trials() -> list[Trial]:
    """Every packing, dtype and activation; rows and columns that fill no threadgroup, chunk or
    lane; 8, 16 and 32 lanes for a row; weights of another dtype than x."""
    three = ProjectionPacking(3, 32, "affine")
    cases = [
        *standard_cases(),
        *(
            (f"3 bits, {d_in} to {n}", make_case(mx.bfloat16, three, d_in=d_in, hidden=n))
            for d_in, n in ((2080, 32), (1024, 512), (512, 1056), (960, 1536))
        ),
        *(
            (f"float16, {d_in} to {n}", make_case(mx.float16, None, d_in=d_in, hidden=n))
            for d_in, n in ((1032, 8), (8, 2056))
        ),
        *(
            (
                f"x in {name}, weights in {held}",
                make_case(dtype, FOUR, d_in=192, hidden=320, held=held, bias=True),
            )
            for name, dtype, held in (
                ("float32", mx.float32, mx.bfloat16),
                ("bfloat16", mx.bfloat16, mx.float32),
            )
        ),
    ]
    return [Trial(label, case, *_CALLS[i % len(_CALLS)]) for i, (label, case) in enumerate(cases)]


def short_trials() -> list[Trial]:
    """One of each format, small enough for compute-sanitizer."""
    dtype = mx.bfloat16
    cases = [
        *((f"{bits} bits", ProjectionPacking(bits, 32, "affine")) for bits in BITS),
        ("mxfp4", MXFP4),
        ("bfloat16", None),
    ]
    # Two chunks of columns and a row more than a threadgroup has, in one kernel or the other.
    widths = ((1056, 32), (32, 1056))
    return [
        Trial(
            f"{label}, {widths[i % 2][0]} to {widths[i % 2][1]}",
            make_case(dtype, packing, d_in=widths[i % 2][0], hidden=widths[i % 2][1], bias=True),
            2,
            3,
        )
        for i, (label, packing) in enumerate(cases)
    ]


def model_trials() -> list[Trial]:
    """Layers of real models, one token; Qwen3.5-397B's in every packing and dtype."""
    bf16 = mx.bfloat16
    qwen = {"d_in": 4096, "hidden": 1024}
    packings = [(f"{bits} bits", ProjectionPacking(bits, 64, "affine"), bf16) for bits in BITS]
    packings += [
        ("4 bits, float16", FOUR, mx.float16),
        ("4 bits, float32", FOUR, mx.float32),
        ("mxfp4", MXFP4, bf16),
        ("bfloat16", None, bf16),
    ]
    trials = [
        Trial(f"Qwen3.5-397B, {label}", make_case(dtype, packing, **qwen), 1, 10)
        for label, packing, dtype in packings
    ]
    small = make_case(bf16, FOUR, d_in=2048, hidden=768)
    oss = make_case(bf16, MXFP4, d_in=2880, hidden=2880, activation=GPT_OSS, bias=True)
    trials += [
        Trial("Qwen3-30B-A3B, 4 bits", small, 1, 8),
        Trial("gpt-oss-120b, mxfp4", oss, 1, 4),
        Trial("Qwen3.5-397B, 4 bits, 8 tokens", make_case(bf16, FOUR, **qwen), 8, 10),
    ]
    return [replace(trial, in_order=True) for trial in trials]


def spread_slots(trial: Trial, calls: int) -> tuple[npt.NDArray[np.int32], int]:
    """Slots [calls, n_pairs] for a bank that holds the trial's several times over, each slot used
    once, always with the weights that the trial's own slots have; and how many times."""
    copies = -(-trial.n_pairs // N_SLOTS)
    first = np.arange(trial.n_pairs, dtype=np.int32)
    starts = np.arange(calls, dtype=np.int32) * (copies * N_SLOTS)
    return starts[:, None] + first, calls * copies
