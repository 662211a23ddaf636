"""`flashmoe tune`: measure how a store is read fastest on this machine, and keep it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from flashmoe.base.units import format_size
from flashmoe.cli import options

if TYPE_CHECKING:
    from flashmoe.io.select import ReadSettings
    from flashmoe.probe.read_tuning import ReadRow
    from flashmoe.probe.tune import TuneReport
    from flashmoe.probe.tuning import Tuning

# Of each race, how many settings beside the default and the chosen one are shown.
SHOWN = 3


def tune(
    store: options.StorePath,
    seconds: Annotated[
        float | None,
        typer.Option(metavar="N", help="Seconds to take, about. Default: 15.", show_default=False),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Measure nothing; show what is stored.")
    ] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Measure nothing; remove what is stored.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Measure how a store is read fastest on this machine, in 15 seconds, and keep it.

    How many reads at once and how large, for decode and for prompts, through the page cache and
    past it. Defaults are left only for what is faster by more than the spread. From then on every
    command uses the choice for what its options leave open (--no-tuned does not). Results never
    change. Run it again when the disk or the machine changes, while nothing else is running.
    """
    from flashmoe.cli.console import late_progress, out, print_dim, print_json
    from flashmoe.engine.model_cache import cache_folder
    from flashmoe.probe.tune import DEFAULT_SECONDS
    from flashmoe.probe.tune import tune as measure
    from flashmoe.probe.tuning import TuningFile
    from flashmoe.store.reader import open_store

    if show and forget:
        raise typer.BadParameter("--show and --forget exclude each other")
    file = TuningFile(cache_folder(), open_store(store))
    if forget:
        forgotten = file.forget()
        if json:
            print_json({"forgotten": forgotten})
        else:
            out.print("forgotten" if forgotten else "nothing was stored", markup=False)
        return
    if show:
        stored = file.read()
        if json:
            print_json(None if stored is None else asdict(stored))
        else:
            _print_choice(stored)
        return
    with late_progress("tuning, seconds", quiet=json) as progress:
        report = measure(
            store,
            seconds=DEFAULT_SECONDS if seconds is None else seconds,
            progress=progress,
        )
    file.write(report.tuning)
    if json:
        print_json({**report.as_dict(), "file": str(file.path)})
        return
    _print_report(report)
    _print_choice(report.tuning)
    print_dim(f"kept in {file.path}; flashmoe tune --forget removes it")


def stored_tuning(store: str) -> Tuning | None:
    """What is stored for a store on this machine."""
    from flashmoe.engine.model_cache import cache_folder
    from flashmoe.probe.tuning import TuningFile
    from flashmoe.store.reader import open_store

    return TuningFile(cache_folder(), open_store(store)).read()


def describe_choice(tuning: Tuning) -> list[tuple[str, str]]:
    """What a choice consists of, as (what, how)."""
    choice = tuning.choice
    rows = [
        (f"{pattern}, {mode}", _settings(settings))
        for mode, reads in (("cached", choice.cached), ("uncached", choice.uncached))
        for pattern, settings in (("decode", reads.decode), ("prefill", reads.prefill))
    ]
    speed = f"{tuning.bytes_per_second / 1e9:.2f} GB/s from the disk in decode's pattern"
    return [*rows, ("expected", speed), ("measured", tuning.when)]


def _print_choice(tuning: Tuning | None) -> None:
    from flashmoe.cli.console import out

    if tuning is None:
        out.print("nothing is stored for this store and machine", markup=False)
        return
    for name, value in describe_choice(tuning):
        out.print(f"{name:<17} {value}", markup=False)


def _print_report(report: TuneReport) -> None:
    from rich.markup import escape
    from rich.table import Table

    from flashmoe.cli.console import out, print_dim

    out.print(f"[bold]{escape(report.store)}[/bold]  {report.seconds:.0f} s")
    table = Table()
    for column in ("page cache", "pattern", "reads", "GB/s (min to max)", ""):
        table.add_column(column, no_wrap=True)
    for row in _shown(report):
        table.add_row(
            "yes" if row.page_cache else "no",
            row.pattern,
            _settings(row.settings),
            f"{row.bytes_per_second / 1e9:.2f} ({row.slowest / 1e9:.2f} to "
            f"{row.fastest / 1e9:.2f})",
            _mark(row.is_default, row.is_chosen),
        )
    out.print(table)
    for note in report.notes:
        print_dim(f"note: {note}")


def _shown(report: TuneReport) -> list[ReadRow]:
    """Of each race the default, the chosen one and the next best."""
    shown: list[ReadRow] = []
    races = dict.fromkeys((row.page_cache, row.pattern) for row in report.reads)
    for race in races:
        rows = [row for row in report.reads if (row.page_cache, row.pattern) == race]
        others = [row for row in rows if not row.is_default and not row.is_chosen]
        kept = others[:SHOWN]
        shown += [row for row in rows if row.is_default or row.is_chosen or row in kept]
    return shown


def _settings(settings: ReadSettings) -> str:
    depth = settings.depth
    reader = "pread" if settings.reader == "auto" else settings.reader
    if depth.piece_bytes is None:
        return f"{reader}, {depth.threads} threads, a piece for each"
    return f"{reader}, {depth.threads} threads, pieces of {format_size(depth.piece_bytes)}"


def _mark(is_default: bool, is_chosen: bool) -> str:
    return " ".join(filter(None, ("default" * is_default, "chosen" * is_chosen)))
