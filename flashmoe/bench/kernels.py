"""Speed of products with packed weights, beside MLX's own op and the speed of memory."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from flashmoe import native
from flashmoe.base import machine
from flashmoe.base.errors import OptionError
from flashmoe.bench.expert_cases import ExpertSet
from flashmoe.bench.matmul_cases import (
    Shape,
    Subject,
    WorkingSet,
    copying,
    device_name,
    resolve_packing,
)
from flashmoe.kernels.contract import ProjectionPacking

SHAPES = (
    Shape("Qwen3.5-397B up", 4096, 1024),
    Shape("Qwen3.5-397B expert", 4096, 1024, experts=True),
    Shape("Qwen3-30B-A3B up", 2048, 768),
    Shape("Qwen3-30B-A3B expert", 2048, 768, experts=True),
    Shape("Qwen3-30B-A3B LM head", 2048, 151_936, routed=False),
)
ROWS = (1, 32)
# Beyond every cache: what a call reads was last read this many bytes ago.
WORKING_SET_BYTES = 600_000_000
# Half a second of MLX's op on a CPU; long beside the start of a call on any device.
PRODUCTS_PER_CALL = 1 << 29


@dataclass(frozen=True)
class KernelResult:
    """One kernel on one shape, `rows` rows of activations per matrix.

    `products_per_second` is the median over rounds, `slowest` and `fastest` its extremes; a row
    makes one product per weight. `bytes_per_second` counts packed weights, scales and biases once
    per call. `share_of_copy` divides it by the copies' rate (None for several rows, and on another
    device than the copies'), `times_mlx` divides the products by those of MLX's op (None for it).
    """

    shape: str
    inputs: int
    outputs: int
    rows: int
    kernel: str
    device: str
    products_per_second: float
    slowest: float
    fastest: float
    bytes_per_second: float
    share_of_copy: float | None
    times_mlx: float | None


@dataclass(frozen=True)
class KernelBench:
    """All results, and what they hold for.

    `device` is where MLX's op and the copies ran; `threads` is how many the native kernels, and
    copies on a CPU, took.
    The copies' rate is a median over rounds too and counts bytes read and bytes written.
    `without_native` says why no native kernel is among the results (None when one is).
    """

    device: str
    threads: int
    bits: int
    group_size: int
    mode: str
    copy_bytes_per_second: float
    without_native: str | None
    results: tuple[KernelResult, ...]


@dataclass(frozen=True)
class _Timing:
    """Seconds of a subject's calls, one per round; the subject itself holds its weights."""

    kernel: str
    device: str
    products: int
    bytes_moved: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def bench_kernels(
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    isas: Sequence[str] = (),
    rounds: int = 5,
    shapes: Sequence[Shape] = SHAPES,
    working_set_bytes: int = WORKING_SET_BYTES,
    products_per_call: int = PRODUCTS_PER_CALL,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> KernelBench:
    """Multiply random packed weights in `rounds` rounds after one of warm-up.

    Activations, and scales and biases of affine weights, are float32, as in a CPU's banks. `bits`
    and `group_size` are the mode's own unless given, `isas` the instruction set in use. The
    subjects take turns within a round, copies of memory among them, so that a machine that
    speeds up or slows down does so for all of them. `progress(done, total)` counts rounds.

    Raises OptionError for a packing that MLX lacks, and for `isas` that cannot be had.
    """
    packing = resolve_packing(mode, bits, group_size)
    without_native = _why_not_native(packing)
    if without_native is not None and isas:
        raise OptionError(f"isa {', '.join(isas)} cannot be measured: {without_native}")
    threads = machine.usable_cores() if native.available() is not None else native.threads()
    total = len(shapes) * len(ROWS) * (1 + rounds)
    done = 0

    def end_round() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    def measure(shape: Shape) -> list[list[_Timing]]:
        made = ExpertSet if shape.experts else WorkingSet
        weights = made.random(shape, packing, working_set_bytes, products_per_call)
        subjects = ([*weights.subjects(rows, chosen), copy] for rows in ROWS)
        return [_take_turns(turns, rounds, end_round) for turns in subjects]

    with _isa_restored(), ThreadPoolExecutor(threads) as pool:
        chosen = _check_isas(isas) if without_native is None else []
        copy = copying(working_set_bytes, pool, threads)
        # A shape at a time: their weights need not be in memory together.
        measured = [
            (shape, rows, timings)
            for shape in shapes
            for rows, timings in zip(ROWS, measure(shape), strict=True)
        ]
    copies = [second for *_, timings in measured for second in timings[-1].seconds]
    copied = copy.bytes_moved / statistics.median(copies)
    return KernelBench(
        device=device_name(),
        threads=threads,
        bits=packing.bits,
        group_size=packing.group_size,
        mode=packing.mode,
        copy_bytes_per_second=copied,
        without_native=without_native,
        results=tuple(
            result
            for shape, rows, timings in measured
            for result in _summarise(shape, rows, timings[:-1], copied, copy.device)
        ),
    )


def _why_not_native(packing: ProjectionPacking) -> str | None:
    missing = native.available()
    if missing is None and not native.covers(packing.mode, packing.bits, packing.group_size):
        return (
            f"the native kernels do not cover {packing.mode} weights of {packing.bits} bits "
            f"in groups of {packing.group_size}"
        )
    return missing


def _check_isas(isas: Sequence[str]) -> list[str]:
    """The names once each, or the one in use; OptionError before anything is measured."""
    for isa in isas:
        native.use_isa(isa)
    return list(dict.fromkeys(isas)) or [native.isa()]


@contextlib.contextmanager
def _isa_restored() -> Iterator[None]:
    if native.available() is not None:
        yield
        return
    isa = native.isa()
    try:
        yield
    finally:
        native.use_isa(isa)


def _take_turns(
    subjects: Sequence[Subject], rounds: int, end_round: Callable[[], None]
) -> list[_Timing]:
    """Time each subject once per round, after a round that warms up."""
    seconds: list[list[float]] = [[] for _ in subjects]
    turn = 0
    for number in range(1 + rounds):
        for subject, taken in zip(subjects, seconds, strict=True):
            started = time.perf_counter()
            subject.run(turn)
            if number > 0:
                taken.append(time.perf_counter() - started)
            turn += 1
        end_round()
    return [
        _Timing(s.kernel, s.device, s.products, s.bytes_moved, tuple(taken))
        for s, taken in zip(subjects, seconds, strict=True)
    ]


def _summarise(
    shape: Shape, rows: int, timings: Sequence[_Timing], copied: float, on: str
) -> Iterator[KernelResult]:
    """Results of what took turns, MLX's op first; `copied` in bytes per second on device `on`."""
    mlx = timings[0]
    for timing in timings:
        rate = timing.products / timing.median
        read = timing.bytes_moved / timing.median
        yield KernelResult(
            shape=shape.name,
            inputs=shape.inputs,
            outputs=shape.outputs,
            rows=rows,
            kernel=timing.kernel,
            device=timing.device,
            products_per_second=rate,
            slowest=timing.products / max(timing.seconds),
            fastest=timing.products / min(timing.seconds),
            bytes_per_second=read,
            share_of_copy=read / copied if rows == 1 and timing.device == on else None,
            times_mlx=None if timing is mlx else rate * mlx.median / mlx.products,
        )
