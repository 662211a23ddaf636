"""`flashmoe bench io`: the readers, beside what else the same files give."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from flashmoe.base.units import format_size
from flashmoe.cli import options

if TYPE_CHECKING:
    from flashmoe.bench.io import ReadReport, ReadResult, Verdict


def io(
    store: options.StorePath,
    reader: Annotated[
        str | None,
        typer.Option(
            metavar="pread|mmap|auto",
            help="The reader to measure. Default: all of them, side by side.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            help="Records per batch; may be given several times. Default: 1, 2, 4, 8, 10 and 32.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(metavar="S", help="Seconds per measurement and round.")
    ] = 0.4,
    rounds: Annotated[int, typer.Option(metavar="N", help="Rounds of all measurements.")] = 3,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="Threads of a reader. Default: as models have it."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Reading speed of a store's records, beside what fio gets from the same files.

    Random records in batches, each complete before the next one begins, as decode reads them:
    through the page cache, emptied before every measurement, and past it. Without fio on the
    PATH the rival is plain reading with the number of threads that is fastest.
    """
    from flashmoe.bench.io import bench_io
    from flashmoe.cli.console import late_progress, print_json
    from flashmoe.io.depth import DEFAULT_THREADS

    if rounds < 1:
        raise typer.BadParameter("--rounds must be at least 1")
    if not 0 < seconds <= 3600:
        raise typer.BadParameter("--seconds must be above 0 and at most 3600")
    if threads is not None and not 1 <= threads <= 256:
        raise typer.BadParameter("--threads must be 1 to 256")
    with late_progress("reading", quiet=json) as progress:
        report = bench_io(
            store,
            reader=reader,
            batches=batch,
            seconds=seconds,
            rounds=rounds,
            threads=threads or DEFAULT_THREADS,
            progress=progress,
        )
    if json:
        print_json(asdict(report))
        return
    _print_reading(report)


def _print_reading(report: ReadReport) -> None:
    from rich.markup import escape
    from rich.table import Table

    from flashmoe.cli.console import out, print_dim

    out.print(
        f"[bold]{escape(report.store)}[/bold]  {report.records} records of "
        f"{format_size(report.record_bytes)} in {report.files} files, {report.threads} threads"
    )
    table = Table()
    for column in (
        "mode",
        "batch",
        "reader",
        "GB/s (min to max)",
        "queue depth",
        "page faults/GB (major)",
        "of rival",
    ):
        table.add_column(column, no_wrap=True)
    for result in report.results:
        table.add_row(*_reading_row(result))
    out.print(table)
    for mode, rival in report.rivals.items():
        verdicts = [verdict for verdict in report.verdicts if verdict.mode == mode]
        if verdicts:
            out.print(_verdict_line(mode, rival, verdicts), markup=False)
    for note in report.notes:
        print_dim(f"note: {note}")


def _reading_row(result: ReadResult) -> list[str]:
    rates = [f"{x / 1e9:.2f}" for x in (result.bytes_per_second, result.slowest, result.fastest)]
    row = [result.mode, str(result.batch), result.reader, f"{rates[0]} ({rates[1]} to {rates[2]})"]
    if result.share is None:
        return [*row, "", "", "rival"]
    faults = f"{result.minor_faults_per_gb:.0f} ({result.major_faults_per_gb:.0f})"
    counted = faults if result.reader == "mmap" else ""
    return [*row, f"{result.queue_depth:.1f}", counted, f"{result.share:.0%}"]


def _verdict_line(mode: str, rival: str, verdicts: list[Verdict]) -> str:
    batches = ", ".join(map(str, verdicts[0].batches))
    shares = ", ".join(
        f"{v.reader} {v.share:.0%} (lowest {v.lowest_share:.0%}, batch {v.lowest_batch})"
        for v in verdicts
    )
    reached = ", ".join(v.reader for v in verdicts if v.reached) or "none"
    return (
        f"decode's pattern (batches of {batches}), {mode}, of {rival}: {shares}; "
        f"target {verdicts[0].target:.0%} reached by: {reached}"
    )
