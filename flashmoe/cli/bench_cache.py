"""`flashmoe bench cache`: hit rates of a recorded trace over policies and bank sizes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashmoe.base.units import format_count, format_size
from flashmoe.cli import options

if TYPE_CHECKING:
    from flashmoe.bench.cache import CacheReport


def cache(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="What flashmoe trace wrote.")],
    share: Annotated[
        list[float] | None,
        typer.Option(
            metavar="X",
            help="A bank's share of all experts, 0 to 1; may be given several times. "
            "Default: 0.05, 0.1, 0.2, 0.35, 0.5 and 0.75.",
            show_default=False,
        ),
    ] = None,
    decode_only: Annotated[
        bool, typer.Option("--decode-only", help="Leave chunks of prompts out.")
    ] = False,
    need_from: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE",
            help="Share slots out by the need in this trace. Default: in TRACE itself.",
            show_default=False,
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Replay a trace over policies and bank sizes, beside the best possible.

    Belady's policy knows the future; nothing that must bring every miss in hits more. "By
    need", layers have different numbers of slots in the same memory.
    """
    from flashmoe.bench.cache import SHARES, bench_cache
    from flashmoe.cli.console import late_progress, print_json

    with late_progress("replaying", quiet=json) as progress:
        report = bench_cache(
            trace,
            shares=share or SHARES,
            decode_only=decode_only,
            need_from=need_from,
            progress=progress,
        )
    if json:
        print_json(asdict(report))
        return
    _print_report(report)


def _print_report(report: CacheReport) -> None:
    from rich.table import Table

    from flashmoe.cli.console import out

    out.print(
        f"{report.trace}: {report.model}, {report.prompts} prompts, {report.tokens} tokens, "
        f"{format_count(report.accesses)} accesses; hit rates, auto is {report.default}",
        markup=False,
    )
    table = Table()
    policies = tuple(report.results[0].hit_rates)
    columns = ("of all", "bank", "slots", *policies, "Belady", "misses / Belady's")
    by_need = tuple(report.results[0].by_need)
    for column in (*columns, *(f"{name} by need (slots)" for name in by_need)):
        table.add_column(column, no_wrap=True)
    for result in report.results:
        table.add_row(
            "one token" if result.share is None else f"{result.share:.0%}",
            format_size(result.bank_bytes),
            _slots(result.slots),
            *(f"{result.hit_rates[name]:.1%}" for name in policies),
            f"{result.belady:.1%}",
            f"{result.times_belady:.2f}",
            *(
                f"{result.by_need[name]:.1%} ({_slots(result.slots_by_need[name])})"
                for name in by_need
            ),
        )
    out.print(table)


def _slots(slots: tuple[int, ...]) -> str:
    least, most = min(slots), max(slots)
    return str(least) if least == most else f"{least} to {most}"
