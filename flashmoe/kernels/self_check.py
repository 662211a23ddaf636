"""Kernels checked on the machine they run on: small random inputs through kernel and twin.

A kernel is checked the first time that a shape class comes up, and replaced by the reference,
with one warning, where it is wrong. Knows no kernel by name.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

import mlx.core as mx
import numpy as np

from flashmoe.base.distribution import installed_version
from flashmoe.kernels import reference
from flashmoe.kernels.activations import recognize
from flashmoe.kernels.check_verdicts import PASSED, Verdicts
from flashmoe.kernels.contract import ExpertForward, ExpertKernel, ExpertSpec, Slots

# Of a row's norm, against the reference in float32: rounding the result to its dtype, and for
# float32 the order of the sums.
TOLERANCES = {mx.float32: 1e-5, mx.float16: 5e-4, mx.bfloat16: 4e-3}

N_SLOTS = 3
N_TOKENS = 2
TOP_K = 3


@dataclass(frozen=True)
class Case:
    """A shape class: what a kernel is compiled for and what it divides into rows and lanes.

    `tensors` maps "projection.tensor" to its shape without slots and its dtype; `d_in` is the
    width of x, `dtype` x's.
    """

    spec: ExpertSpec
    tensors: Mapping[str, tuple[tuple[int, ...], mx.Dtype]]
    d_in: int
    dtype: mx.Dtype

    @property
    def label(self) -> str:
        """One line that tells shape classes apart."""
        known = recognize(self.spec.activation, self.spec.kind == "SwitchGLU")
        parts = []
        for name, (shape, dtype) in sorted(self.tensors.items()):
            packing = self.spec.packing.get(name.partition(".")[0])
            how = _name(dtype)
            if packing is not None and name.endswith(".weight"):
                how = f"{packing.mode} {packing.bits}/{packing.group_size}"
            parts.append(f"{name} {how} {'x'.join(map(str, shape))}")
        activation = f"{self.spec.kind} with {known or 'an activation of its own'}"
        return f"{activation}, x {_name(self.dtype)}, {', '.join(parts)}"

    def random_weights(self, n_slots: int = N_SLOTS, seed: int = 0) -> dict[str, mx.array]:
        """A bank of this class whose outputs are of the order of 1."""
        rng = np.random.default_rng(seed)
        made = {}
        for name, (shape, dtype) in self.tensors.items():
            projection, _, tensor = name.partition(".")
            packing = self.spec.packing.get(projection)
            full = (n_slots, *shape)
            if packing is None or tensor == "bias":
                values = rng.standard_normal(full, np.float32)
                if tensor == "weight":
                    values /= np.sqrt(np.float32(shape[-1]))
                made[name] = mx.array(values).astype(dtype)
            elif tensor == "weight":
                made[name] = mx.array(rng.integers(0, 1 << 32, full, np.uint32))
            elif dtype == mx.uint8:
                made[name] = mx.array(rng.integers(120, 124, full, np.uint8))
            else:
                # Codes are centred by the biases; a row of them has a norm of about 1.
                columns = shape[-1] * packing.group_size
                scale = 4.0 / (1 << packing.bits) / np.sqrt(columns)
                if tensor == "biases":
                    scale *= -((1 << packing.bits) - 1) / 2
                made[name] = mx.array(scale * rng.uniform(0.8, 1.2, full)).astype(dtype)
        mx.eval(made)
        return made


@dataclass(frozen=True)
class CheckOutcome:
    """The largest relative error of a row, or why there is none; `verdict` is PASSED or a
    sentence."""

    error: float | None
    tolerance: float
    verdict: str

    @property
    def passed(self) -> bool:
        return self.verdict == PASSED


def case_of(weights: Mapping[str, mx.array], spec: ExpertSpec, dtype: mx.Dtype) -> Case:
    """The shape class of a bank under inputs of `dtype`."""
    tensors = {name: (tuple(array.shape[1:]), array.dtype) for name, array in weights.items()}
    first = "up_proj" if spec.kind == "SwitchGLU" else "fc1"
    packing = spec.packing.get(first)
    if packing is None:
        d_in = weights[f"{first}.weight"].shape[-1]
    else:
        d_in = weights[f"{first}.scales"].shape[-1] * packing.group_size
    return Case(spec, tensors, d_in, dtype)


def check(kernel: ExpertKernel, case: Case) -> CheckOutcome:
    """Run a kernel and its twin, the reference in float32 on the CPU, on the same random
    weights."""
    tolerance = TOLERANCES[case.dtype]
    weights = case.random_weights()
    widened = {k: v.astype(mx.float32) if _is_float(v) else v for k, v in weights.items()}
    rng = np.random.default_rng(1)
    x = mx.array(rng.standard_normal((N_TOKENS, case.d_in), np.float32)).astype(case.dtype)
    slots = rng.integers(0, N_SLOTS, (N_TOKENS, TOP_K), np.int32)
    # On the CPU: no GPU kernel, and no reduced precision of matrix units, has a part in it.
    with mx.stream(mx.cpu):
        twin = reference.bind_experts(widened, case.spec)(x.astype(mx.float32), slots)
    expected = np.array(twin, np.float64)
    try:
        y = kernel(weights, case.spec)(x, slots)
        found = np.array(y.astype(mx.float32), np.float64)
    except (RuntimeError, ValueError) as failure:
        reason = str(failure).strip().splitlines() or [type(failure).__name__]
        return CheckOutcome(None, tolerance, f"it fails: {reason[0]}")
    if found.shape != expected.shape:
        wrong = f"its shape is {found.shape}, not {expected.shape}"
        return CheckOutcome(None, tolerance, wrong)
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    worst = float(error.max())
    # NaN compares false.
    if worst <= tolerance:
        return CheckOutcome(worst, tolerance, PASSED)
    return CheckOutcome(
        worst, tolerance, f"its relative error is {worst:.2g}, above {tolerance:.0e}"
    )


@dataclass
class Checker:
    """Checks each shape class of a kernel once on this machine, and remembers.

    `covers` says whether the kernel does a bank's work itself; where it hands it on there is
    nothing to check. `revision` changes when the kernel does.
    """

    name: str
    kernel: ExpertKernel
    covers: Callable[[Mapping[str, mx.array], ExpertSpec], bool]
    revision: str
    verdicts: Verdicts
    _warned: set[str] = field(default_factory=set)

    def bind_experts(self, weights: Mapping[str, mx.array], spec: ExpertSpec) -> ExpertForward:
        """The kernel where it passes its check, otherwise the reference; `contract.ExpertKernel`.

        The check runs at the first call with inputs of a dtype.
        """
        own = self.kernel(weights, spec)
        if not self.covers(weights, spec):
            return own
        twin = reference.bind_experts(weights, spec)
        cases = {dtype: case_of(weights, spec, dtype) for dtype in TOLERANCES}
        chosen: dict[mx.Dtype, ExpertForward] = {}

        def forward(x: mx.array, slots: Slots) -> mx.array:
            if x.dtype not in chosen:
                case = cases.get(x.dtype)
                chosen[x.dtype] = own if case is None or self.trusts(case) else twin
            return chosen[x.dtype](x, slots)

        return forward

    def trusts(self, case: Case) -> bool:
        """Whether the kernel is right for this class; warns once for each where it is not."""
        key = f"{self.name} {self.revision} | {machine_name()} | {case.label}"
        verdict = self.verdicts.get(key)
        if verdict is None:
            verdict = check(self.kernel, case).verdict
            self.verdicts.put(key, verdict)
        if verdict != PASSED and key not in self._warned:
            self._warned.add(key)
            warnings.warn(
                f"kernel {self.name} is wrong on this machine, so the reference takes its place: "
                f"{verdict}, for {case.label}",
                RuntimeWarning,
                stacklevel=3,
            )
        return verdict == PASSED


def machine_name() -> str:
    """What a verdict holds for: device, operating system, versions."""
    device = mx.device_info().get("device_name", "unknown device")
    packages = f"mlx {version('mlx')} flashmoe {installed_version()}"
    return f"{device} | {platform.platform()} | {packages}"


def _is_float(array: mx.array) -> bool:
    return array.dtype in TOLERANCES


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]
