"""Bank, page cache and prefetch: the second part of `flashmoe tune`, with the model running."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from flashmoe.base.errors import FlashMoEError
from flashmoe.bench.arms import Arm, Outcome, try_arms
from flashmoe.bench.child_process import Share, run_apart
from flashmoe.bench.prompts import QUESTIONS
from flashmoe.engine.api import FlashMoEModel
from flashmoe.engine.options import Options
from flashmoe.generation.session import Piece, Sampling
from flashmoe.io.plain import plain_rate
from flashmoe.probe.read_tuning import TunedReads
from flashmoe.probe.tuning import Choice, parse_choice
from flashmoe.store.reader import Store, open_store

# Greedy answers of a model that says little go round in circles, and so do their experts.
TEMPERATURE = 1.0
ANSWER_TOKENS = 256
# A process ends its last turn so long before its time is over.
END_SECONDS = 2.0
# Beyond its time, a process may finish what it began.
GRACE_SECONDS = 5.0
# Of the time: at most so much for bringing all records into the page cache.
CACHING_SHARE = 0.25


@dataclass(frozen=True)
class RunRow:
    """One setting with the model running: tokens per second, median and extremes over its
    turns."""

    name: str
    bank_bytes: int
    page_cache: bool
    prefetch: bool
    hit_rate: float
    tokens_per_second: float
    slowest: float
    fastest: float
    is_chosen: bool


@dataclass(frozen=True)
class TunedModel:
    """What was best with the model running (a bank of None: the default), and the best one's
    speed (None without a run)."""

    choice: Choice
    tokens_per_second: float | None
    rows: tuple[RunRow, ...]
    notes: tuple[str, ...]


def tune_model(
    store: Store,
    reads: TunedReads,
    memory: str | int | None,
    seconds: float,
    *,
    free_bytes: int,
    tick: Callable[[], None] = lambda: None,
) -> TunedModel:
    """Run the model with a few settings within about `seconds`, in a process of its own.

    `free_bytes` of memory decide whether the page cache could hold all records. A model that
    cannot be loaded and run in that time keeps the defaults, and a note says so.
    """
    started = time.perf_counter()
    choice = Choice(reads.cached, reads.uncached or Choice().uncached)
    fits = store.manifest.streamed_bytes <= free_bytes
    if fits:
        notes = [_cache_records(store, reads.rate(True, "prefill"), seconds)]
    else:
        notes = [
            "the records do not fit into free memory: the page cache began as earlier runs left "
            "it, and may keep more in the long run"
        ]
    left = seconds - (time.perf_counter() - started)
    task = {
        "store": str(store.path.resolve()),
        "memory": memory,
        "choice": asdict(choice),
        "uncached": reads.uncached is not None,
        # By the clock that processes share: starting one is part of its time.
        "ends": time.time() + left - END_SECONDS,
    }
    try:
        found = run_apart(try_arms_as_json, task, limit_seconds=left + GRACE_SECONDS, tick=tick)
    except FlashMoEError as error:
        notes.append(f"bank, page cache and prefetch were not tuned: {error}")
        return TunedModel(choice, None, (), tuple(notes))
    rows = tuple(RunRow(**row) for row in found["rows"])
    return TunedModel(
        choice=parse_choice(found["choice"]),
        tokens_per_second=found["tokens_per_second"],
        rows=rows,
        notes=(*notes, *found["notes"]),
    )


def try_arms_as_json(task: dict[str, Any], progress: Share) -> dict[str, Any]:
    """What the process of its own does."""
    choice = parse_choice(task["choice"])
    options = Options(memory=task["memory"], tuned=choice)
    with FlashMoEModel(open_store(task["store"]), options) as model:
        seconds = max(task["ends"] - time.time(), 0.0)
        outcome = try_arms(
            Decoder(model),
            choice,
            seconds,
            uncached=task["uncached"],
            moved=lambda: progress(1 - max(task["ends"] - time.time(), 0) / max(seconds, 1e-9)),
        )
    return asdict(tuned_by(outcome))


def tuned_by(outcome: Outcome) -> TunedModel:
    """What an outcome means."""
    best = outcome.best
    rows = tuple(_row(arm, arm is best) for arm in outcome.arms)
    return TunedModel(best.choice, best.median, rows, outcome.notes)


class Decoder:
    """Decodes one token after the other; after an answer comes the next question."""

    def __init__(self, model: FlashMoEModel) -> None:
        self._model = model
        self._asked = 0
        self._silent = 0
        self._pieces: Iterator[Piece] = iter(())

    @property
    def bank_bytes(self) -> int:
        return self._model.memory_plan.bank_bytes

    @property
    def least_bank_bytes(self) -> int:
        return self._model.memory_plan.least_bank_bytes

    @property
    def most_bank_bytes(self) -> int:
        return self._model.memory_plan.most_bank_bytes

    @property
    def page_cache(self) -> bool:
        return self._model.page_cache

    @property
    def bytes_read(self) -> int:
        return self._model.live_stats.bytes_read

    @property
    def accesses(self) -> tuple[int, int]:
        stats = self._model.live_stats
        return stats.hits, stats.misses

    def retune(self, choice: Choice) -> None:
        self._model.retune(choice)

    def decode(self, count: int, most_seconds: float) -> list[float]:
        """The seconds of so many tokens, of fewer when they take longer together, but of one at
        least; first ones of answers are none of them.

        Raises FlashMoEError when the model ends all its answers at once.
        """
        taken: list[float] = []
        while not taken or (len(taken) < count and sum(taken) < most_seconds):
            started = time.perf_counter()
            piece = next(self._pieces, None)
            if piece is None or piece.token is None:
                self._ask()
            else:
                taken.append(time.perf_counter() - started)
                self._silent = 0
        return taken

    def _ask(self) -> None:
        """Begin another answer, up to its first token."""
        if self._silent == len(QUESTIONS):
            raise FlashMoEError("the model ends its answers at once: there is nothing to measure")
        self._silent += 1
        self._pieces = self._model.session().stream(
            QUESTIONS[self._asked % len(QUESTIONS)],
            max_new_tokens=ANSWER_TOKENS,
            sampling=Sampling(TEMPERATURE, seed=self._asked),
        )
        self._asked += 1
        next(self._pieces)


def _cache_records(store: Store, bytes_per_second: float, seconds: float) -> str:
    """Bring the records into the page cache, which could hold them all, as a long run would."""
    needed = store.manifest.streamed_bytes / bytes_per_second
    if needed > CACHING_SHARE * seconds:
        return (
            f"the page cache could hold all records, but reading them takes {needed:.0f} s: it "
            "began as it was, and will be faster in the long run"
        )
    places = [
        (store.file(layer.layout.file), layer.layout.record_offset(expert))
        for layer in store.manifest.layers
        for expert in range(layer.layout.n_experts)
    ]
    most = max(layer.layout.record.stride for layer in store.manifest.layers)
    # All of them, even if it takes a little longer than thought.
    plain_rate(places, most, 4, 2 * CACHING_SHARE * seconds, True)
    return "the page cache held all records, as there is free memory for them"


def _row(arm: Arm, is_chosen: bool) -> RunRow:
    return RunRow(
        name=arm.name,
        bank_bytes=arm.bank_bytes,
        page_cache=arm.page_cache,
        prefetch=arm.prefetch,
        hit_rate=arm.hit_rate,
        tokens_per_second=arm.median,
        slowest=min(arm.rates),
        fastest=max(arm.rates),
        is_chosen=is_chosen,
    )
