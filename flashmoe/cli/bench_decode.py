"""`flashmoe bench decode`: decode speed over memory sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashmoe.base.units import format_duration, format_size
from flashmoe.cli import options

if TYPE_CHECKING:
    from flashmoe.bench.decode import DecodeReport
    from flashmoe.bench.disk_rate import DiskRate
    from flashmoe.bench.pass_figures import PassFigures, Spread

# What they are held against, for a disk that is the limit.
TARGETS = "targets: overlap at least 0.50, waiting at most 1.15, host at most 15%"


@options.with_engine_options_but("memory", "cache", "warm_start")
def decode(
    model: options.Model = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for the whole process; may be given several times. "
            "Default: three quarters of what is free.",
            show_default=False,
        ),
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE|min",
            help="Memory for the bank of experts alone; may be given several times.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts, one per line. Default: four that are often measured with.",
            show_default=False,
        ),
    ] = None,
    *,
    engine: options.EngineOptions,
    max_tokens: options.MaxTokens = 128,
    temp: options.Temperature = 0.0,
    no_template: options.NoTemplate = False,
    cgroup: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Put each process into a memory cgroup of this size, which counts the page "
            "cache too (Linux, root).",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also draw the figures, as .png or .svg.", show_default=False
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Decode speed over memory sizes, beside what disk and kernels alone would take.

    Every size is a fresh process that answers all prompts twice: cold, with an empty bank and
    page cache, then warm. Example:
    flashmoe bench decode big.flashmoe --memory 2GB --memory 4GB --plot big.svg
    """
    from flashmoe.base.units import parse_size
    from flashmoe.bench.decode import Asked, bench_decode
    from flashmoe.bench.plots import check_plot, plot_decode
    from flashmoe.bench.prompts import PROMPTS, read_prompts
    from flashmoe.cli.console import byte_progress, late_progress, print_dim, print_json
    from flashmoe.engine.model_cache import open_model
    from flashmoe.engine.options import Options

    if plot is not None:
        check_plot(plot)
    base = vars(engine)
    sizes = [Options(**{**base, "memory": size}) for size in memory or ()]
    sizes += [Options(**{**base, "cache": size}) for size in cache or ()]
    sizes = sizes or [Options(**base)]
    asked = Asked(
        prompts=PROMPTS if prompts is None else read_prompts(prompts),
        max_tokens=max_tokens,
        temperature=temp,
        template=not no_template,
        cgroup_bytes=None if cgroup is None else parse_size(cgroup),
    )
    with byte_progress("repacking", json) as repacked:
        store = open_model(model, progress=repacked)
    with late_progress("decoding", quiet=json) as progress:
        report = bench_decode(store.path, sizes, asked, progress=progress)
    if plot is not None:
        plot_decode(report, plot)
    if json:
        print_json(asdict(report))
        return
    _print_points(report)
    print_dim(TARGETS)
    for note in report.notes:
        print_dim(f"note: {note}")


def _print_points(report: DecodeReport) -> None:
    _print_head(report, report.points[0].kernel)
    speeds, times = [], []
    for point in report.points:
        given = None if point.memory_bytes is None else format_size(point.memory_bytes)
        bank = f"{format_size(point.bank_bytes)} ({point.bank_share:.0%})"
        for figures in point.passes:
            peak = format_size(point.peak_memory_bytes)
            speeds.append([given or "", peak, bank, figures.name, *_speed_cells(figures)])
            times.append([given or bank, figures.name, *_time_cells(figures)])
    _print_table(("--memory", "peak", "bank (of all)", "pass", *SPEEDS), speeds)
    _print_table(("--memory" if report.points[0].memory_bytes else "bank", "pass", *TIMES), times)


def _print_head(report: DecodeReport, kernel: str) -> None:
    from flashmoe.cli.console import out

    disk: DiskRate = report.disk
    cgroup = report.cgroup_bytes
    rates = [f"{x / 1e9:.2f}" for x in (disk.bytes_per_second, disk.slowest, disk.fastest)]
    out.print(
        f"{report.store}: {format_size(report.streamed_bytes)} of experts, kernel {kernel}, "
        f"{report.prompts} prompts, answers of up to {report.max_tokens} tokens"
        f"{'' if cgroup is None else f', cgroup of {format_size(cgroup)}'}; the disk gives "
        f"{rates[0]} GB/s ({rates[1]} to {rates[2]}, {disk.by})",
        markup=False,
    )


SPEEDS = (
    "tokens",
    "tok/s (p10 to p90)",
    "prompt tok/s",
    "first token",
    "hit rate (kept)",
    "read/token",
    "read/absent",
    "GB/s (of disk)",
)
# Milliseconds per token, by phase, and what computing and reading would take alone.
TIMES = (
    "ms/token",
    "computing",
    "experts",
    "reading",
    "host (share)",
    "compute alone",
    "read alone",
    "overlap",
    "waiting",
)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    from flashmoe.cli.console import out

    table = Table()
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def _speed_cells(figures: PassFigures) -> list[str]:
    return [
        str(figures.tokens),
        _spread(figures.tokens_per_second),
        f"{figures.prefill_tokens_per_second.median:.1f}",
        format_duration(figures.first_token_seconds.median),
        f"{figures.hit_rate:.0%} ({figures.kept_rate:.0%})",
        format_size(figures.bytes_read_per_token),
        _number(figures.read_of_absent),
        f"{figures.bytes_per_second / 1e9:.2f} ({figures.share_of_disk:.0%})",
    ]


def _time_cells(figures: PassFigures) -> list[str]:
    phases = {name: f"{1000 * seconds:.1f}" for name, seconds in figures.phases.items()}
    compute = figures.compute_seconds
    return [
        f"{1000 * figures.token_seconds:.1f}",
        phases["computing"],
        phases["experts"],
        phases["reading"],
        f"{phases['host']} ({figures.host_share:.0%})",
        "" if compute is None else f"{1000 * compute:.1f}",
        f"{1000 * figures.read_seconds:.1f}",
        _number(figures.overlap),
        _number(figures.waiting_of_disk),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _spread(rates: Spread) -> str:
    digits = 2 if rates.median < 10 else 1
    return f"{rates.median:.{digits}f} ({rates.p10:.{digits}f} to {rates.p90:.{digits}f})"
