"""Hits of a recorded trace over bank sizes: LRU, LFU, and the best possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from belady import belady_hits
from replay import layer_steps, replay
from trace_file import TracedLayer, read_trace

from flashmoe.bank.eviction import LFU, LRU
from flashmoe.base.errors import OptionError

# Shares of all experts; one token's needs come first in any case.
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)


@dataclass(frozen=True)
class SizeHits:
    """Hits in banks of one size, empty at the start.

    `share` is of all experts (None: one token's needs), `slots` what each layer has of them.
    """

    share: float | None
    slots: tuple[int, ...]
    bank_bytes: int
    lru: int
    lfu: int
    belady: int


@dataclass(frozen=True)
class TraceReport:
    """A trace and what its accesses (distinct experts of each call) would have hit."""

    trace: str
    model: str
    prompts: int
    tokens: int
    accesses: int
    sizes: tuple[SizeHits, ...]


def replay_sizes(
    path: Path, *, shares: Sequence[float] = SHARES, decode_only: bool = False
) -> TraceReport:
    """Replay a trace over bank sizes.

    Raises SourceError for a file that is no trace, and OptionError for a share outside 0 to 1 or
    a trace in which `decode_only` leaves nothing.
    """
    wrong = [share for share in shares if not 0 < share <= 1]
    if wrong:
        raise OptionError(f"a share of all experts is above 0 and at most 1, not {wrong[0]}")
    trace = read_trace(path)
    steps = [layer_steps(trace, i, decode_only=decode_only) for i in range(len(trace.layers))]
    accesses = sum(len(step) for layer in steps for step in layer)
    if accesses == 0:
        raise OptionError(f"{path} has no token that was fed alone; record longer answers")
    sizes = []
    for slots, share in _shapes(trace.layers, shares).items():
        banks = list(zip(steps, slots, strict=True))
        sizes.append(
            SizeHits(
                share,
                slots,
                sum(n * x.record_bytes for n, x in zip(slots, trace.layers, strict=True)),
                lru=sum(replay(layer, LRU(n)) for layer, n in banks),
                lfu=sum(replay(layer, LFU(n)) for layer, n in banks),
                belady=sum(belady_hits(layer, n) for layer, n in banks),
            )
        )
    return TraceReport(
        trace=str(path),
        model=trace.model,
        prompts=trace.prompts,
        tokens=len(trace.experts),
        accesses=accesses,
        sizes=tuple(sizes),
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
