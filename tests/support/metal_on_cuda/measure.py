"""The trials on a device: errors against float64, and GB/s beside the device's own copies."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from tests.support.metal_on_cuda.device import Slots, Timing
from tests.support.metal_on_cuda.exact import row_error, wide
from tests.support.metal_on_cuda.requests import Request
from tests.support.metal_on_cuda.trials import Question, Trial, spread_slots

# Larger than any cache.
BANK_BYTES = 2_000_000_000
COPY_BYTES = 1 << 30
REPEATS = 30


class Device(Protocol):
    """What runs requests; see `device.CudaDevice`."""

    name: str

    def run(self, request: Request) -> mx.array: ...

    def time(self, request: Request, slots: Slots, copies: int, repeats: int) -> Timing: ...

    def copy_seconds(self, bytes_: int, calls: int, repeats: int) -> list[float]: ...


@dataclass(frozen=True)
class Check:
    """The largest error of an output row, relative to its norm."""

    trial: str
    kernel: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Speed:
    """Microseconds and GB/s of one call, median, with the slowest and fastest run; a copy's GB/s
    count what it reads and what it writes. `like_copy` is a copy that moves as much as the call
    instead."""

    trial: str
    kernel: str
    bytes_: int
    microseconds: float
    gb_per_s: float
    slowest: float
    fastest: float
    of_copy: float
    of_like_copy: float


def copy_rate(device: Device, moved_bytes: int, calls: int, repeats: int) -> float:
    """Bytes/s of copies that read and write `moved_bytes` together."""
    half = max(256, moved_bytes // 2 // 256 * 256)
    return 2 * half / statistics.median(device.copy_seconds(half, calls, repeats))


def check(device: Device, trials: Iterable[Trial]) -> list[Check]:
    return [
        _check(trial, question, device.run(question.request))
        for trial in trials
        for question in trial.questions()
    ]


def measure(
    device: Device,
    trials: Iterable[Trial],
    bank_bytes: int = BANK_BYTES,
    copy_bytes: int = COPY_BYTES,
    repeats: int = REPEATS,
) -> tuple[float, list[Check], list[Speed]]:
    """The copy's bytes/s, and every trial checked and timed, a bank's slots used once in turn."""
    copy = copy_rate(device, 2 * copy_bytes, 1, repeats)
    checks, speeds = [], []
    for trial in trials:
        for question in trial.questions():
            moved = question.traffic.total_bytes
            calls = max(2, bank_bytes // moved)
            slots, copies = spread_slots(trial, calls)
            timing = device.time(question.request, slots, copies, repeats)
            checks += [_check(trial, question, y) for y in (timing.first, timing.last)]
            rates = [moved / seconds for seconds in timing.seconds]
            rate = statistics.median(rates)
            like = copy_rate(device, moved, calls, repeats)
            speeds.append(
                Speed(
                    trial.label,
                    question.kernel,
                    moved,
                    moved / rate * 1e6,
                    rate / 1e9,
                    min(rates) / 1e9,
                    max(rates) / 1e9,
                    rate / copy,
                    rate / like,
                )
            )
    return copy, checks, speeds


def _check(trial: Trial, question: Question, output: mx.array) -> Check:
    error = row_error(wide(output), question.expected)
    return Check(trial.label, question.kernel, error, question.tolerance)
