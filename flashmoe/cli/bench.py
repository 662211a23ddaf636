"""`flashmoe bench`: measurements that print a figure beside what it could be."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from flashmoe.cli import options
from flashmoe.cli.bench_cache import cache
from flashmoe.units import format_size

if TYPE_CHECKING:
    from flashmoe.bench.io import ReadReport, ReadResult, Verdict

app = typer.Typer(
    help="Measure this machine and this engine.", add_completion=False, rich_markup_mode=None
)

app.command()(cache)


@app.callback()
def _root() -> None:
    """Measure this machine and this engine."""


@app.command()
def decode(
    model: options.Model = None,
    max_tokens: options.MaxTokens = 32,
    rounds: Annotated[int, typer.Option(metavar="N", help="Rounds per bank size.")] = 5,
    json: options.Json = False,
) -> None:
    """Decode speed over bank sizes, beside stock mlx-lm with every weight in memory.

    The page cache is warm: what is seen is the engine's own cost, not the disk's.
    """
    from rich.table import Table

    from flashmoe.bench.decode import bench_decode
    from flashmoe.cli.console import out, print_json

    if rounds < 1:
        raise typer.BadParameter("--rounds must be at least 1")
    if max_tokens < 2:
        raise typer.BadParameter("--max-tokens must be at least 2: the first one is not decoded")
    results = bench_decode(model, max_tokens=max_tokens, rounds=rounds)
    if json:
        print_json([asdict(result) for result in results])
        return
    table = Table()
    for column in (
        "experts",
        "bank",
        "hit rate",
        "read/token",
        "tok/s (min to max)",
        "of resident",
    ):
        table.add_column(column, no_wrap=True)
    for result in results:
        table.add_row(
            result.name,
            "all in memory" if result.bank_bytes is None else format_size(result.bank_bytes),
            f"{result.hit_rate:.0%}",
            format_size(result.bytes_read_per_token),
            f"{result.tokens_per_second:.1f} ({result.slowest:.1f} to {result.fastest:.1f})",
            "" if result.ratio is None else f"{result.ratio:.2f}",
        )
    out.print(table)


@app.command()
def kernels(
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Bits per weight. Default: the mode's own.", show_default=False
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Weights that share a scale. Default: the mode's own.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="How MLX packs: affine, mxfp4, nvfp4, mxfp8.")
    ] = "affine",
    isa: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Instruction set of the native kernels (avx512, avx2, neon, portable); "
            "may be given several times. Default: the one in use.",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", help="Rounds per matrix.")] = 5,
    json: options.Json = False,
) -> None:
    """Speed of products with packed weights, beside MLX's own ops and copies of memory.

    Matrices and whole experts of real models with random weights, more of them than any cache
    holds: it takes 1.5 GB of memory.
    """
    from rich.table import Table

    from flashmoe.bench.kernels import bench_kernels
    from flashmoe.cli.console import late_progress, out, print_json

    if rounds < 1:
        raise typer.BadParameter("--rounds must be at least 1")
    with late_progress("multiplying", quiet=json) as progress:
        bench = bench_kernels(
            bits=bits,
            group_size=group_size,
            mode=mode,
            isas=isa or (),
            rounds=rounds,
            progress=progress,
        )
    if json:
        print_json(asdict(bench))
        return
    out.print(
        f"{bench.bits}-bit {bench.mode}, groups of {bench.group_size}; MLX on the {bench.device}; "
        f"native kernels and copies on {bench.threads} threads; memory copies at "
        f"{bench.copy_bytes_per_second / 1e9:.1f} GB/s, read and written",
        markup=False,
    )
    if bench.without_native is not None:
        out.print(f"no native kernel: {bench.without_native}", markup=False)
    table = Table()
    for column in (
        "weights",
        "in x out",
        "rows",
        "kernel",
        "G weights/s (min to max)",
        "GB/s",
        "of copy",
        "x MLX",
    ):
        table.add_column(column, no_wrap=True)
    for result in bench.results:
        rates = (result.products_per_second, result.slowest, result.fastest)
        median, slowest, fastest = (f"{rate / 1e9:.1f}" for rate in rates)
        table.add_row(
            result.shape,
            f"{result.inputs} x {result.outputs}",
            str(result.rows),
            result.kernel,
            f"{median} ({slowest} to {fastest})",
            f"{result.bytes_per_second / 1e9:.2f}",
            "" if result.share_of_copy is None else f"{result.share_of_copy:.0%}",
            "" if result.times_mlx is None else f"{result.times_mlx:.1f}",
        )
    out.print(table)


@app.command()
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
    from flashmoe.io.pieces import DEFAULT_THREADS

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
