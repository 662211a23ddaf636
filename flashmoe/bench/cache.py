"""Hit rates of a recorded trace over policies and bank sizes, beside the best possible."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flashmoe.bank.policy.select import AUTO, POLICY_NAMES, make_policy
from flashmoe.base.errors import OptionError
from flashmoe.bench.belady import belady_hits
from flashmoe.bench.replay import layer_steps, replay
from flashmoe.bench.trace_file import TracedLayer, read_trace
from flashmoe.memory.budget import LayerDemand
from flashmoe.memory.hit_curves import (
    HitCurve,
    Step,
    lfu_hit_curve,
    lru_hit_curve,
    share_by_need,
)

# Shares of all experts; one token's needs come first in any case.
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
# The policies that a layer's need is measured for.
NEEDS = ("lru", "lfu")


@dataclass(frozen=True)
class CacheResult:
    """One bank size.

    `share` is of all experts (None: one token's needs), `slots` what each layer has of them.
    `hit_rates` goes by policy. `belady` is the hit rate of the best possible eviction, and
    `times_belady` the default policy's misses by its misses. `by_need` has the hit rates of LRU
    and LFU when the same memory is shared out over layers by need, as `slots_by_need`.
    """

    share: float | None
    slots: tuple[int, ...]
    bank_bytes: int
    hit_rates: dict[str, float]
    belady: float
    times_belady: float
    slots_by_need: dict[str, tuple[int, ...]]
    by_need: dict[str, float]


@dataclass(frozen=True)
class CacheReport:
    """A trace and what its accesses (distinct experts of each call) would have hit."""

    trace: str
    model: str
    prompts: int
    tokens: int
    accesses: int
    default: str
    results: tuple[CacheResult, ...]


@dataclass
class _Size:
    """A bank size, and the hits counted so far over the layers."""

    share: float | None
    slots: tuple[int, ...]
    bank_bytes: int
    slots_by_need: dict[str, tuple[int, ...]]
    hits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(POLICY_NAMES, 0))
    belady: int = 0
    by_need: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NEEDS, 0))

    def count(self, layer: int, steps: Sequence[Step]) -> None:
        """Replay one layer's accesses."""
        for name in self.hits:
            self.hits[name] += replay(steps, make_policy(name, self.slots[layer]))
        for name in self.by_need:
            self.by_need[name] += replay(steps, make_policy(name, self.slots_by_need[name][layer]))
        self.belady += belady_hits(steps, self.slots[layer])

    def result(self, accesses: int) -> CacheResult:
        return CacheResult(
            share=self.share,
            slots=self.slots,
            bank_bytes=self.bank_bytes,
            hit_rates={name: hits / accesses for name, hits in self.hits.items()},
            belady=self.belady / accesses,
            # The first use of an expert is always a miss.
            times_belady=(accesses - self.hits[AUTO]) / (accesses - self.belady),
            slots_by_need=self.slots_by_need,
            by_need={name: hits / accesses for name, hits in self.by_need.items()},
        )


def bench_cache(
    path: Path,
    *,
    shares: Sequence[float] = SHARES,
    decode_only: bool = False,
    need_from: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CacheReport:
    """Replay a trace over all policies and bank sizes, banks empty at the start.

    `need_from` is the trace that the layers' needs are measured in, by default the same one.
    `progress(done, total)` counts layers and bank sizes. Raises SourceError for a file that is
    no trace, and OptionError for a share outside 0 to 1, a `need_from` of another model, or a
    trace in which `decode_only` leaves nothing.
    """
    wrong = [share for share in shares if not 0 < share <= 1]
    if wrong:
        raise OptionError(f"a share of all experts is above 0 and at most 1, not {wrong[0]}")
    trace = read_trace(path)
    measured = trace if need_from is None else read_trace(need_from)
    if measured.layers != trace.layers:
        raise OptionError(f"{need_from} and {path} are traces of different models")
    shapes = _shapes(trace.layers, shares)
    total = len(trace.layers) * (1 + len(shapes))
    done = itertools.count()
    curves: dict[str, list[HitCurve]] = {name: [] for name in NEEDS}
    for i, layer in enumerate(trace.layers):
        progress(next(done), total)
        steps = layer_steps(measured, i, decode_only=decode_only)
        curves["lru"].append(lru_hit_curve(steps, layer.n_experts))
        curves["lfu"].append(lfu_hit_curve(steps, layer.n_experts))
    sizes = [_size(trace.layers, curves, share, slots) for slots, share in shapes.items()]
    accesses = 0
    for i in range(len(trace.layers)):
        steps = layer_steps(trace, i, decode_only=decode_only)
        accesses += sum(map(len, steps))
        for size in sizes:
            progress(next(done), total)
            size.count(i, steps)
    progress(total, total)
    if accesses == 0:
        raise OptionError(f"{path} has no token that was fed alone; record longer answers")
    return CacheReport(
        trace=str(path),
        model=trace.model,
        prompts=trace.prompts,
        tokens=len(trace.experts),
        accesses=accesses,
        default=AUTO,
        results=tuple(size.result(accesses) for size in sizes),
    )


def _shapes(
    layers: Sequence[TracedLayer], shares: Sequence[float]
) -> dict[tuple[int, ...], float | None]:
    """Slots per layer of one token's needs (None) and of each share, without repetitions."""
    shapes: dict[tuple[int, ...], float | None] = {tuple(x.top_k for x in layers): None}
    for share in sorted(shares):
        slots = tuple(max(x.top_k, round(share * x.n_experts)) for x in layers)
        shapes.setdefault(slots, share)
    return shapes


def _size(
    layers: Sequence[TracedLayer],
    curves: dict[str, list[HitCurve]],
    share: float | None,
    slots: tuple[int, ...],
) -> _Size:
    """A bank of these slots, and the same memory shared out by need."""
    demands = [LayerDemand(x.record_bytes, x.top_k, x.n_experts) for x in layers]
    bank_bytes = sum(n * x.record_bytes for n, x in zip(slots, layers, strict=True))
    by_need = {name: share_by_need(curves[name], demands, bank_bytes) for name in NEEDS}
    return _Size(share, slots, bank_bytes, by_need)
