"""Consoles, progress bars and the lines that several commands share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from flashmoe.base import machine
from flashmoe.base.units import format_duration, format_size

if TYPE_CHECKING:
    from flashmoe.bank.stats import Seconds, Stats
    from flashmoe.base.clock import Phases
    from flashmoe.engine.api import FlashMoEModel

# Where there is no terminal, lines are as long as they are.
WIDTH_OF_PIPES = 200


def _console(stderr: bool = False) -> Console:
    console = Console(highlight=False, soft_wrap=True, stderr=stderr)
    if not console.is_terminal:
        console.width = WIDTH_OF_PIPES
    return console


out = _console()
err = _console(stderr=True)

# What takes longer than this gets a progress bar.
PATIENCE_SECONDS = 2.0


def print_json(value: Any) -> None:
    """One line that a program can read."""
    print(json.dumps(value))


def print_dim(text: str) -> None:
    out.print(f"[dim]{escape(text)}[/dim]")


@contextmanager
def byte_progress(title: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes, rate and ETA on stderr; yields `progress(done_bytes, total_bytes)`."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def progress(done_bytes: int, total_bytes: int) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes)

        yield progress


@contextmanager
def late_progress(title: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A transient bar on stderr for what takes long; yields `progress(done, total)`, any unit."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    bar = Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal)
    task = bar.add_task(title, total=None)
    started = time.perf_counter()

    def progress(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()
        elif time.perf_counter() - started > PATIENCE_SECONDS:
            bar.start()

    try:
        yield progress
    finally:
        bar.stop()


def stats_lines(stats: Stats) -> list[str]:
    """Where the time went, and how well records were prefetched if any were."""
    seconds = stats.seconds
    lines = [
        _time_line("prefill", seconds.prefill, seconds.in_prefill),
        _time_line("decode", seconds.decode, seconds.in_decode),
    ]
    precision, recall = stats.prefetch_precision, stats.prefetch_recall
    if precision is not None and recall is not None:
        lines.append(
            f"{stats.prefetched} records prefetched · precision {precision:.0%} · "
            f"recall {recall:.0%} · {format_size(stats.bytes_wasted)} read in vain"
        )
    return lines


def _time_line(name: str, seconds: float, phases: Phases) -> str:
    parts = {
        "attention and router": phases.computing,
        "waiting for reads": phases.reading,
        "experts": phases.experts,
        "host": phases.host,
    }
    whole = phases.total or 1.0
    each = " · ".join(f"{part} {spent / whole:.0%}" for part, spent in parts.items())
    return f"{name} {seconds:.2f} s: {each}"


@dataclass(frozen=True)
class AnswerReport:
    """What one answer took; sizes in bytes, times in seconds.

    `seconds` and the figures of the prefetch are those of `Stats`, `lossy` is the model's.
    """

    prompt_tokens: int
    tokens: int
    tokens_per_second: float
    seconds_to_first_token: float
    hits: int
    misses: int
    hit_rate: float
    bytes_read: int
    bytes_demanded: int
    bytes_read_per_token: float
    warm_started: int
    warm_started_used: int
    bank_bytes: int
    peak_memory_bytes: int
    prefetched: int
    prefetched_used: int
    not_prefetched: int
    prefetch_precision: float | None
    prefetch_recall: float | None
    bytes_wasted: int
    seconds: Seconds
    lossy: tuple[str, ...]

    @classmethod
    def of(cls, model: FlashMoEModel, stats: Stats, first_token: float) -> AnswerReport:
        fed = max(stats.prompt_tokens + stats.tokens - 1, 1)
        later = stats.tokens - 1
        decode = stats.seconds.decode
        return cls(
            prompt_tokens=stats.prompt_tokens,
            tokens=stats.tokens,
            tokens_per_second=later / decode if later > 0 and decode > 0 else 0.0,
            seconds_to_first_token=first_token,
            hits=stats.hits,
            misses=stats.misses,
            hit_rate=stats.hit_rate,
            bytes_read=stats.bytes_read,
            bytes_demanded=stats.bytes_demanded,
            bytes_read_per_token=stats.bytes_read / fed,
            warm_started=stats.warm_started,
            warm_started_used=stats.warm_started_used,
            bank_bytes=model.bank_bytes,
            peak_memory_bytes=machine.peak_resident_set_bytes(),
            prefetched=stats.prefetched,
            prefetched_used=stats.prefetched_used,
            not_prefetched=stats.not_prefetched,
            prefetch_precision=stats.prefetch_precision,
            prefetch_recall=stats.prefetch_recall,
            bytes_wasted=stats.bytes_wasted,
            seconds=stats.seconds,
            lossy=model.lossy,
        )

    def line(self) -> str:
        """The one line under an answer."""
        return (
            f"{self.tokens} tokens · {self.tokens_per_second:.1f} tok/s · first token "
            f"{format_duration(self.seconds_to_first_token)} · hit rate {self.hit_rate:.0%} · "
            f"{format_size(self.bytes_read_per_token)} read/token · bank "
            f"{format_size(self.bank_bytes)} · peak memory {format_size(self.peak_memory_bytes)}"
        )

    def details(self) -> str:
        """The first line that --stats adds."""
        line = (
            f"{self.prompt_tokens} prompt tokens · {self.hits} hits · {self.misses} misses · "
            f"{format_size(self.bytes_read)} read of {format_size(self.bytes_demanded)} demanded"
        )
        if self.warm_started:
            line += f" · {self.warm_started_used} of {self.warm_started} warm_started experts used"
        if self.lossy:
            line += f" · lossy: {', '.join(self.lossy)}"
        return line

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
