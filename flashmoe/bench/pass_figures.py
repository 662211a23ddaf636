"""From what a pass counted and timed to figures beside their ceilings: pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.bench.decode_worker import Pass

# As `flashmoe.base.clock` has them, in the order of tables and pictures.
PHASES = ("computing", "experts", "reading", "host")
# Of a token's time, what is too little to be hidden behind anything.
NEGLIGIBLE = 1 / 100


@dataclass(frozen=True)
class Spread:
    """A median, and the tenth and ninetieth percentile around it."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class PassFigures:
    """One pass over the prompts: `tokens` decoded tokens, all but the first of each answer.

    Rates are spreads over decoded tokens, or over answers for prompts; the rest are totals over
    decode divided by its tokens. `token_seconds` is the time per token, `phases` where it went.
    `hit_rate` counts what was prefetched in time, `kept_rate` only what the bank had kept.
    `compute_seconds` is a token's time with its experts all in the bank (None: not measured),
    `read_seconds` what the disk's own rate takes for the bytes read. `overlap` is the share of
    the shorter of these two that is hidden behind the other.
    `waiting_of_disk` is the time spent waiting for reads by what the disk's own rate takes for the
    bytes that were absent, `read_of_absent` the bytes read by these; None when none were.
    """

    name: str
    tokens: int
    tokens_per_second: Spread
    prefill_tokens_per_second: Spread
    first_token_seconds: Spread
    hit_rate: float
    kept_rate: float
    bytes_read_per_token: float
    read_of_absent: float | None
    bytes_per_second: float
    share_of_disk: float
    token_seconds: float
    phases: dict[str, float]
    host_share: float
    compute_seconds: float | None
    read_seconds: float
    overlap: float | None
    waiting_of_disk: float | None


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    p10, median, p90 = np.percentile(values, (10, 50, 90))
    return Spread(float(median), float(p10), float(p90))


def overlap(compute_seconds: float, read_seconds: float, wall_seconds: float) -> float | None:
    """The share of the shorter of computing and reading that is hidden behind the other.

    0 when they follow one another, 1 when the shorter takes no time of its own; below 0 when
    something else takes time. None when one of them takes next to none, of which no share can be
    told.
    """
    shorter = min(compute_seconds, read_seconds)
    if shorter <= NEGLIGIBLE * wall_seconds:
        return None
    return (compute_seconds + read_seconds - wall_seconds) / shorter


def pass_figures(taken: Pass, disk_bytes_per_second: float) -> PassFigures:
    """The figures of a pass that decoded a token at least."""
    decode = taken.decode
    tokens = int(decode["tokens"])
    wall = decode["seconds"] / tokens
    phases = {name: decode[name] / tokens for name in PHASES}
    compute = float(np.median(taken.computing_seconds)) if taken.computing_seconds else None
    read = decode["bytes_read"] / tokens / disk_bytes_per_second
    absent = decode["bytes_absent"] / tokens
    reached = decode["bytes_read"] / decode["seconds"]
    return PassFigures(
        name=taken.name,
        tokens=tokens,
        tokens_per_second=spread([1 / taking for taking in taken.token_seconds]),
        prefill_tokens_per_second=spread(
            [
                count / taking
                for count, taking in zip(taken.prompt_tokens, taken.prefill_seconds, strict=True)
            ]
        ),
        first_token_seconds=spread(taken.first_token_seconds),
        hit_rate=decode["hits"] / (decode["hits"] + decode["misses"]),
        kept_rate=1 - decode["bytes_absent"] / decode["bytes_demanded"],
        bytes_read_per_token=decode["bytes_read"] / tokens,
        read_of_absent=decode["bytes_read"] / tokens / absent if absent else None,
        bytes_per_second=reached,
        share_of_disk=reached / disk_bytes_per_second,
        token_seconds=wall,
        phases=phases,
        host_share=phases["host"] / wall,
        compute_seconds=compute,
        read_seconds=read,
        overlap=None if compute is None else overlap(compute, read, wall),
        waiting_of_disk=phases["reading"] / (absent / disk_bytes_per_second) if absent else None,
    )
