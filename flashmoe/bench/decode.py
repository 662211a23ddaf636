"""Decode speed over memory sizes, each in a fresh process, cold and then warm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flashmoe.base.errors import OptionError
from flashmoe.base.progress import Progress
from flashmoe.base.units import parse_size
from flashmoe.bench.decode_worker import Point, PointRun, run_in_child
from flashmoe.bench.disk_rate import Disk, DiskRate
from flashmoe.bench.pass_figures import PassFigures, pass_figures
from flashmoe.bench.prompts import PROMPTS
from flashmoe.engine.options import Options
from flashmoe.generation.session import Sampling
from flashmoe.probe.record_files import cached_share, evict
from flashmoe.store.reader import Store, open_store

COLD, WARM = "cold", "warm"


@dataclass(frozen=True)
class Asked:
    """What every point of a run is asked: prompts, each a conversation of its own.

    Answers have up to `max_tokens` tokens, sampled at `temperature` with the same seeds for
    every point; `template`: whether prompts become user messages. `cgroup_bytes` is the memory
    cgroup that each process is put into, page cache included.
    """

    prompts: tuple[str, ...] = PROMPTS
    max_tokens: int = 128
    temperature: float = 0.0
    template: bool = True
    cgroup_bytes: int | None = None

    def __post_init__(self) -> None:
        Sampling(self.temperature)
        if self.max_tokens < 2:
            raise OptionError("max-tokens must be at least 2: the first one is not decoded")


@dataclass(frozen=True)
class DecodePoint:
    """One memory size: the number given (None: the default, or a bank of a given size), the
    bank's with its share of all experts, and the process's peak. `passes`: first cold, with an
    empty bank and page cache, then the same prompts again, warm."""

    memory_bytes: int | None
    bank_bytes: int
    bank_share: float
    peak_memory_bytes: int
    kernel: str
    page_cache: bool
    passes: tuple[PassFigures, ...]


@dataclass(frozen=True)
class DecodeReport:
    """All points of a store."""

    store: str
    streamed_bytes: int
    prompts: int
    max_tokens: int
    cgroup_bytes: int | None
    disk: DiskRate
    notes: tuple[str, ...]
    points: tuple[DecodePoint, ...]


def bench_decode(
    folder: str | Path,
    sizes: Sequence[Options],
    asked: Asked,
    *,
    progress: Progress = lambda done, total: None,
) -> DecodeReport:
    """Answer the prompts with each of `sizes` (memory or cache, and all other options).

    Points and samples of the disk take turns. `progress(done, total)`
    counts thousandths of a point. Raises what opening a store and answering raise.
    """
    store = open_store(folder)
    total = 1000 * len(sizes)
    progress(0, total)
    disk = Disk(store)
    notes = _page_cache_notes(store)
    runs: list[PointRun] = []
    for number, options in enumerate(sizes):
        point = point_of(store, options, asked, (COLD, WARM))
        evict(_store_files(store))

        def say(share: float, first: int = 1000 * number) -> None:
            progress(first + round(1000 * share), total)

        runs.append(run_in_child(point, cgroup_bytes=asked.cgroup_bytes, progress=say))
        disk.sample()
    progress(total, total)
    rate = disk.rate()
    return DecodeReport(
        store=str(folder),
        streamed_bytes=store.manifest.streamed_bytes,
        prompts=len(asked.prompts),
        max_tokens=asked.max_tokens,
        cgroup_bytes=asked.cgroup_bytes,
        disk=rate,
        notes=(*disk.notes, *notes, *_lossy_notes(runs)),
        points=tuple(_point(options, run, rate) for options, run in zip(sizes, runs, strict=True)),
    )


def point_of(store: Store, options: Options, asked: Asked, passes: tuple[str, ...]) -> Point:
    """The point that answers what is asked."""
    return Point(
        store=str(store.path),
        # Cold is an empty bank, whatever ran before.
        options=asdict(replace(options, warm_start=False)),
        prompts=asked.prompts,
        passes=passes,
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        template=asked.template,
    )


def _store_files(store: Store) -> list[Path]:
    """Every file of a store, as far as the page cache may hold it."""
    return [path for path in store.path.rglob("*") if path.is_file()]


def _page_cache_notes(store: Store) -> list[str]:
    """Empties the store out of the page cache; what there is to say about that."""
    files = [store.file(layer.layout.file) for layer in store.manifest.layers]
    if not evict(_store_files(store)):
        return ["the page cache cannot be emptied here without root: no point is cold to it"]
    left = cached_share(files)
    return [f"{left:.1%} of the records stayed in the page cache when it was emptied"] * (left > 0)


def _lossy_notes(runs: Sequence[PointRun]) -> list[str]:
    """That the answers are not the model's own, where options made them so."""
    return [f"LOSSY: {said}" for said in dict.fromkeys(said for run in runs for said in run.lossy)]


def _point(options: Options, run: PointRun, rate: DiskRate) -> DecodePoint:
    return DecodePoint(
        memory_bytes=None if options.memory is None else parse_size(options.memory),
        bank_bytes=run.bank_bytes,
        bank_share=run.bank_bytes / run.most_bank_bytes,
        peak_memory_bytes=run.peak_memory_bytes,
        kernel=run.kernel,
        page_cache=run.page_cache,
        passes=tuple(pass_figures(taken, rate.bytes_per_second) for taken in run.passes),
    )
