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
    from flashmoe.base.clock import Phases
    from flashmoe.engine.api import FlashMoEModel
    from flashmoe.generation.report import Report

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


def report_lines(report: Report) -> list[str]:
    """Where the time went, and how well records were prefetched if any were."""
    seconds = report.seconds
    lines = [
        _time_line("prefill", seconds.prefill, seconds.in_prefill),
        _time_line("decode", seconds.decode, seconds.in_decode),
    ]
    precision, recall = report.prefetch_precision, report.prefetch_recall
    if precision is not None and recall is not None:
        lines.append(
            f"{report.prefetched} records prefetched · precision {precision:.0%} · "
            f"recall {recall:.0%} · {format_size(report.bytes_wasted)} read in vain"
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
class AnswerSummary:
    """An answer's report, beside what the model then had; sizes in bytes, times in seconds."""

    report: Report
    seconds_to_first_token: float
    bank_bytes: int
    peak_memory_bytes: int
    lossy: tuple[str, ...]

    @classmethod
    def of(cls, model: FlashMoEModel, report: Report, first_token: float) -> AnswerSummary:
        peak = machine.peak_resident_set_bytes()
        return cls(report, first_token, model.bank_bytes, peak, model.lossy)

    @property
    def bytes_read_per_token(self) -> float:
        """Bytes from disk for each token that went through the model; the last one does not."""
        report = self.report
        return report.bytes_read / max(report.fed_tokens + report.generated_tokens - 1, 1)

    def line(self) -> str:
        """The one line under an answer."""
        report = self.report
        return (
            f"{report.generated_tokens} tokens · {report.tokens_per_second:.1f} tok/s · "
            f"first token {format_duration(self.seconds_to_first_token)} · "
            f"hit rate {report.hit_rate:.0%} · "
            f"{format_size(self.bytes_read_per_token)} read/token · bank "
            f"{format_size(self.bank_bytes)} · peak memory {format_size(self.peak_memory_bytes)}"
        )

    def details(self) -> list[str]:
        """What --stats adds."""
        report = self.report
        line = (
            f"{report.prompt_tokens} prompt tokens ({report.cached_tokens} cached) · "
            f"{report.hits} hits · {report.misses} misses · {format_size(report.bytes_read)} "
            f"read of {format_size(report.bytes_demanded)} demanded"
        )
        if report.warm_started:
            line += (
                f" · warm start: {report.warm_started_used} of {report.warm_started} experts used"
            )
        if self.lossy:
            line += f" · lossy: {', '.join(self.lossy)}"
        return [line, *report_lines(report)]

    def as_dict(self) -> dict[str, Any]:
        report = self.report
        return {
            **asdict(report),
            "tokens_per_second": report.tokens_per_second,
            "seconds_to_first_token": self.seconds_to_first_token,
            "hit_rate": report.hit_rate,
            "bytes_read_per_token": self.bytes_read_per_token,
            "prefetch_precision": report.prefetch_precision,
            "prefetch_recall": report.prefetch_recall,
            "bank_bytes": self.bank_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "lossy": self.lossy,
        }
