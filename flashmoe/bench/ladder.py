"""What each part of the engine brings: the same answers with one part more at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flashmoe.bank.arrivals import APART_BYTES
from flashmoe.base.errors import FlashMoEError, OptionError
from flashmoe.bench.decode import (
    COLD,
    Asked,
    Progress,
    lossy_notes,
    page_cache_notes,
    point_of,
    store_files,
)
from flashmoe.bench.decode_worker import PointRun, run_in_child
from flashmoe.bench.disk_rate import Disk, DiskRate
from flashmoe.bench.pass_figures import PassFigures, pass_figures
from flashmoe.engine.model_cache import cache_folder
from flashmoe.engine.options import Options
from flashmoe.probe.record_files import evict
from flashmoe.probe.tuning import TuningFile
from flashmoe.store.reader import Store, open_store
from flashmoe.streaming.parts import Parts

TARGET = 3.2
# A rung ends after so long; the first one reads whole layers.
RUNG_SECONDS = 60.0


@dataclass(frozen=True)
class Step:
    """A rung's name, and what is on; `tuned`: what `flashmoe tune` stored decides the rest."""

    name: str
    parts: Parts
    prefetch: bool | None = False
    tuned: bool = False


STEPS: tuple[Step, ...] = (
    Step("naive", Parts(routed=False, bank=False, overlap=False)),
    Step("routed only", Parts(bank=False, overlap=False)),
    Step("bank", Parts(overlap=False)),
    Step("overlap", Parts()),
    Step("prefetch", Parts(), prefetch=True),
    Step("tuned", Parts(), prefetch=None, tuned=True),
)


@dataclass(frozen=True)
class Rung:
    """One rung: what is on, and its figures; `prefetch` None leaves it to what is `tuned`.

    `of_naive` and `of_previous` divide its median tokens per second by those of the first rung
    and of the one before.
    """

    name: str
    parts: Parts
    prefetch: bool | None
    tuned: bool
    bank_bytes: int
    peak_memory_bytes: int
    kernel: str
    page_cache: bool
    figures: PassFigures
    of_naive: float
    of_previous: float


@dataclass(frozen=True)
class LadderReport:
    """All rungs, of which the last is the engine as it is; `reached`: at least `target` times as
    fast as the first."""

    store: str
    streamed_bytes: int
    memory: str | int | None
    prompts: int
    max_tokens: int
    cgroup_bytes: int | None
    disk: DiskRate
    notes: tuple[str, ...]
    rungs: tuple[Rung, ...]
    target: float
    reached: bool


def bench_ladder(
    folder: str | Path,
    options: Options,
    asked: Asked,
    *,
    rung_seconds: float = RUNG_SECONDS,
    progress: Progress = lambda done, total: None,
) -> LadderReport:
    """Answer the prompts once per rung, each in a fresh process, cold, in the same memory.

    Without anything stored by `flashmoe tune`, or with `options.tuned` off, the last rung is left
    out. A rung that takes longer than `rung_seconds` decodes fewer tokens. Raises OptionError for
    a route bias, under which answers depend on the bank, FlashMoEError when rungs give different
    tokens, and what opening a store and answering raise.
    """
    if options.route_bias:
        raise OptionError("the ladder's rungs give the same tokens: leave --route-bias out")
    store = open_store(folder)
    steps = STEPS
    if not options.tuned or TuningFile(cache_folder(), store).read() is None:
        steps = tuple(step for step in STEPS if not step.tuned)
    total = 1000 * len(steps)
    progress(0, total)
    disk = Disk(store)
    notes = [*page_cache_notes(store), *_notes(store, steps)]
    runs: list[PointRun] = []
    for number, step in enumerate(steps):
        own = replace(options, prefetch=step.prefetch, tuned=step.tuned)
        point = replace(
            point_of(store, own, asked, (COLD,)),
            parts=asdict(step.parts),
            most_seconds=rung_seconds,
        )
        evict(store_files(store))

        def say(share: float, first: int = 1000 * number) -> None:
            progress(first + round(1000 * share), total)

        runs.append(run_in_child(point, cgroup_bytes=asked.cgroup_bytes, progress=say))
        check_same_answers(runs[0], runs[-1], step.name)
        disk.sample()
    progress(total, total)
    rate = disk.rate()
    rungs = _rungs(steps, runs, rate.bytes_per_second)
    return LadderReport(
        store=str(folder),
        streamed_bytes=store.manifest.streamed_bytes,
        memory=options.memory,
        prompts=len(asked.prompts),
        max_tokens=asked.max_tokens,
        cgroup_bytes=asked.cgroup_bytes,
        disk=rate,
        notes=(*disk.notes, *notes, *lossy_notes(runs)),
        rungs=tuple(rungs),
        target=TARGET,
        reached=rungs[-1].of_naive >= TARGET,
    )


def check_same_answers(one: PointRun, other: PointRun, name: str) -> None:
    """Raise FlashMoEError unless two runs agree as far as both have answered."""
    pairs = zip(one.passes[0].answers, other.passes[0].answers, strict=False)
    for number, (expected, found) in enumerate(pairs):
        length = min(len(expected), len(found))
        if expected[:length] != found[:length]:
            raise FlashMoEError(
                f"the rung {name!r} answered question {number + 1} with other tokens than the "
                "first rung: please report it"
            )


def _notes(store: Store, steps: Sequence[Step]) -> list[str]:
    notes = []
    if not any(step.tuned for step in steps):
        notes.append("no rung for tuned options: flashmoe tune stores them, and none are in use")
    smallest = min(layer.layout.record.stride for layer in store.manifest.layers)
    if smallest < APART_BYTES:
        notes.append(
            f"records below {APART_BYTES // 1024} KiB are read as one batch: "
            "overlap and prefetch have no part in them"
        )
    return notes


def _rungs(
    steps: Sequence[Step], runs: Sequence[PointRun], disk_bytes_per_second: float
) -> list[Rung]:
    rungs: list[Rung] = []
    for step, run in zip(steps, runs, strict=True):
        figures = pass_figures(run.passes[0], disk_bytes_per_second)
        rate = figures.tokens_per_second.median
        first = rungs[0].figures.tokens_per_second.median if rungs else rate
        before = rungs[-1].figures.tokens_per_second.median if rungs else rate
        rungs.append(
            Rung(
                name=step.name,
                parts=step.parts,
                prefetch=step.prefetch,
                tuned=step.tuned,
                bank_bytes=run.bank_bytes,
                peak_memory_bytes=run.peak_memory_bytes,
                kernel=run.kernel,
                page_cache=run.page_cache,
                figures=figures,
                of_naive=rate / first,
                of_previous=rate / before,
            )
        )
    return rungs
