"""Bank, page cache and forecast: the second part of `flashmoe tune`, with the model running."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from flashmoe.bench.decode_run import (
    LEAST_TOKENS,
    PATIENCE,
    DecodeRun,
    decode_run,
)
from flashmoe.bench.race import is_faster
from flashmoe.bench.tune_reads import TunedReads
from flashmoe.errors import FlashMoEError
from flashmoe.io.plain import plain_rate
from flashmoe.store.reader import Store
from flashmoe.tuning import BankChoice, Choice

# A model's figures say more than those of a reader, and are noisier.
MARGIN = 0.05
# The bank warms up during the first of a run's tokens.
WARM_UP_SHARE = 0.25
SEGMENTS = 6
# Of the time for all runs: what the first may decode, and what it may take with loading.
DECODE_SHARE, FIRST_SHARE = 0.1, 0.9
MOST_DECODE_SECONDS = 6.0
HALF = 0.5
SLOWEST = 1.5


@dataclass(frozen=True)
class RunRow:
    """One setting with the model running: tokens per second, median and extremes over segments
    of the run."""

    name: str
    bank_bytes: int
    page_cache: bool
    forecast: bool
    hit_rate: float
    tokens_per_second: float
    slowest: float
    fastest: float
    is_chosen: bool


@dataclass(frozen=True)
class TunedModel:
    """What was best with the model running (None: the default), and the best one's speed (None
    without a run)."""

    choice: Choice
    tokens_per_second: float | None
    rows: tuple[RunRow, ...]
    notes: tuple[str, ...]


@dataclass
class _Arm:
    """A setting and what its runs gave: rates over segments of the same tokens."""

    name: str
    choice: Choice
    run: DecodeRun
    rates: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def forecast(self) -> bool:
        return self.choice.bank is None or self.choice.bank.forecast


@dataclass
class _Runs:
    """Runs one process after the other until `ends`, each with the tokens of the first."""

    store: Path
    memory: str | int | None
    ends: float
    tick: Callable[[], None]
    clock: Callable[[], float]
    tokens: int | None = None
    taken: float = 0.0
    arms: list[_Arm] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.ends - self.clock()

    def first(self, name: str, choice: Choice) -> _Arm | None:
        decode_seconds = min(self.left * DECODE_SHARE, MOST_DECODE_SECONDS)
        return self._run(name, choice, decode_seconds, self.left * FIRST_SHARE)

    def another(self, name: str, choice: Choice) -> _Arm | None:
        """None when there is no time left for it, or when it failed."""
        if self.left < 1.2 * self.taken:
            self.notes.append(f"no time was left for: {name}")
            return None
        # Slower than the first by half is too slow to be of interest.
        seconds = SLOWEST * sum(self.arms[0].run.token_seconds) / PATIENCE
        return self._run(name, choice, seconds, self.left)

    def _run(self, name: str, choice: Choice, seconds: float, limit: float) -> _Arm | None:
        started = self.clock()
        try:
            run = decode_run(
                self.store,
                self.memory,
                choice,
                tokens=self.tokens,
                seconds=seconds,
                limit_seconds=limit,
                tick=self.tick,
            )
        except FlashMoEError as failed:
            self.notes.append(f"{name}: {failed}")
            return None
        self.taken = max(self.taken, self.clock() - started)
        count = len(run.token_seconds)
        if self.tokens is not None and count < self.tokens:
            self.notes.append(f"{name}: slower by half than the default, given up")
            return None
        if count < LEAST_TOKENS:
            self.notes.append(f"{name}: {count} tokens in the time there is tell nothing")
            return None
        self.tokens = count
        arm = _Arm(name, choice, run, segment_rates(run.token_seconds))
        self.arms.append(arm)
        return arm


def segment_rates(token_seconds: tuple[float, ...]) -> list[float]:
    """Tokens per second of SEGMENTS equal parts of a run, its warm-up left out."""
    warm = token_seconds[int(len(token_seconds) * WARM_UP_SHARE) :]
    marks = [len(warm) * i // SEGMENTS for i in range(SEGMENTS + 1)]
    return [(b - a) / sum(warm[a:b]) for a, b in pairwise(marks)]


def tune_model(
    store: Store,
    reads: TunedReads,
    memory: str | int | None,
    seconds: float,
    *,
    free_bytes: int,
    tick: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> TunedModel:
    """Run the model with a few settings within about `seconds`.

    `free_bytes` of memory decide whether the page cache could hold all records. A model that
    cannot be loaded and run in that time keeps the defaults, and a note says so.
    """
    choice = Choice(reads.cached, reads.uncached or Choice().uncached)
    runs = _Runs(store.path, memory, clock() + seconds, tick, clock)
    fits = store.manifest.streamed_bytes <= free_bytes
    if fits:
        runs.notes += _warm(store, seconds)
    base = runs.first("as by default", choice)
    if base is None:
        return TunedModel(choice, None, (), (*runs.notes, "bank and page cache were not tuned"))
    run = base.run
    best = base
    if run.bank_bytes < run.most_bank_bytes:
        kept = BankChoice(run.bank_bytes, 1.0, run.page_cache, True)
        others: list[tuple[str, BankChoice]] = []
        if reads.uncached is not None:
            other = replace(kept, page_cache=not run.page_cache)
            others.append(("past the page cache" if run.page_cache else "page cache", other))
        if run.bank_bytes * HALF >= run.least_bank_bytes:
            half = replace(kept, page_cache=True, bank_share=HALF)
            others.append(("half the bank, page cache", half))
        others.append(("no forecast", replace(kept, forecast=False)))
        if not fits and any(bank.page_cache for _, bank in others):
            runs.notes.append(
                "the records do not fit into free memory: the page cache began as earlier runs "
                "left it, and may keep more in the long run"
            )
        for name, bank in others:
            arm = runs.another(name, replace(choice, bank=bank))
            if arm is not None and arm.median > best.median:
                best = arm
    else:
        runs.notes.append("the bank holds every expert: there is nothing else to choose")
    if best is not base:
        again = runs.another("as by default, again", choice)
        # A machine that changed meanwhile shows it by running the same thing differently.
        bases = [base] if again is None else [base, again]
        if not all(is_faster(best.rates, arm.rates, MARGIN) for arm in bases):
            best = base
    rows = tuple(_row(arm, arm is best) for arm in runs.arms)
    return TunedModel(best.choice, best.median, rows, tuple(runs.notes))


def _warm(store: Store, seconds: float) -> list[str]:
    """Bring the records into the page cache, which could hold them all, as a long run would."""
    places = [
        (store.file(layer.layout.file), layer.layout.record_offset(expert), layer.layout.record)
        for layer in store.manifest.layers
        for expert in range(layer.layout.n_experts)
    ]
    most = max(record.stride for _, _, record in places)
    started = time.perf_counter()
    plain_rate([(path, offset) for path, offset, _ in places], most, 4, seconds / 8, True)
    if time.perf_counter() - started >= seconds / 8:
        return ["the page cache could hold all records, and held a part: there was no time"]
    return ["the page cache held all records, as there is free memory for them"]


def _row(arm: _Arm, is_chosen: bool) -> RunRow:
    return RunRow(
        name=arm.name,
        bank_bytes=arm.run.bank_bytes,
        page_cache=arm.run.page_cache,
        forecast=arm.forecast,
        hit_rate=arm.run.hit_rate,
        tokens_per_second=arm.median,
        slowest=min(arm.rates),
        fastest=max(arm.rates),
        is_chosen=is_chosen,
    )
