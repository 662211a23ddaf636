"""Whole routed experts for `bench kernels`: gate, up, activation and down of a few at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import SwiGLU

from flashmoe import native
from flashmoe.bench.matmul_cases import PackedMatrix, Shape, Subject, WorkingSet, device_name
from flashmoe.kernels import cpu, metal, reference
from flashmoe.kernels.contract import ExpertForward, ExpertSpec, ProjectionPacking, Slots

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertSet:
    """`n_slots` experts with a gate, inputs -> outputs -> inputs, as a layer's bank holds them."""

    shape: Shape
    packing: ProjectionPacking
    projections: tuple[PackedMatrix, PackedMatrix, PackedMatrix]
    n_slots: int
    products_per_call: int

    @classmethod
    def random(
        cls, shape: Shape, packing: ProjectionPacking, least_bytes: int, products_per_call: int
    ) -> ExpertSet:
        """As many experts as take `least_bytes`."""
        back = Shape(shape.name, shape.outputs, shape.inputs)
        parts = [
            WorkingSet.random(part, packing, -(-least_bytes // 3), products_per_call)
            for part in (shape, shape, back)
        ]
        n_slots = min(part.n_slots for part in parts)
        gate, up, down = (part.packed.map(lambda array: array[:n_slots]) for part in parts)
        return cls(shape, packing, (gate, up, down), n_slots, products_per_call)

    def subjects(self, rows: int, isas: Sequence[str]) -> list[Subject]:
        """MLX's ops, the Metal kernels where there is Metal, then the native kernel on each
        instruction set, with `rows` rows an expert.

        A call takes as many experts as make `products_per_call`: one token's for one row, as in
        a decode step, otherwise each with rows of its own, as in a prompt.
        """
        products = 3 * rows * self.shape.inputs * self.shape.outputs
        n = min(max(1, self.products_per_call // products), self.n_slots)
        weights = {
            f"{name}.{tensor}": array
            for name, packed in zip(_PROJECTIONS, self.projections, strict=True)
            for tensor, array in packed._asdict().items()
            if array is not None
        }
        spec = ExpertSpec("SwitchGLU", SwiGLU(), dict.fromkeys(_PROJECTIONS, self.packing))
        n_tokens = 1 if rows == 1 else n * rows
        x = mx.random.normal((n_tokens, self.shape.inputs), key=mx.random.key(1))
        mx.eval(x, weights)

        def slots(turn: int) -> Slots:
            taken = (turn * n + np.arange(n)) % self.n_slots
            return np.repeat(taken.astype(np.int32), rows).reshape(n_tokens, -1)

        def run(forward: ExpertForward, turn: int) -> None:
            mx.eval(forward(x, slots(turn)))

        def run_native(isa: str, forward: ExpertForward, turn: int) -> None:
            native.use_isa(isa)
            run(forward, turn)

        moved = n * sum(packed.nbytes for packed in self.projections) // self.n_slots
        subject = partial(Subject, products=n * products, bytes_moved=moved)
        twin = partial(run, reference.bind_experts(weights, spec))
        subjects = [subject("mlx experts", device_name(), run=twin)]
        if metal.available() is None and self.packing.mode in ("affine", "mxfp4"):
            decode = partial(run, metal.bind_experts(weights, spec))
            subjects.append(subject("metal", "gpu", run=decode))
        if isas:
            forward = cpu.bind_experts(weights, spec)
            subjects += [
                subject(f"native {isa}", "cpu", run=partial(run_native, isa, forward))
                for isa in isas
            ]
        return subjects
