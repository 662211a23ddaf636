"""`flashmoe bench resident`: the engine's own cost, beside the same weights all in memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from flashmoe.base.units import format_size
from flashmoe.cli import options


def resident(
    model: options.Model = None,
    max_tokens: options.MaxTokens = 32,
    rounds: Annotated[int, typer.Option(metavar="N", help="Rounds per bank size.")] = 5,
    json: options.Json = False,
) -> None:
    """Decode speed over bank sizes, beside stock mlx-lm with every weight in memory.

    The page cache is warm: what is seen is the engine's own cost, not the disk's.
    """
    from rich.table import Table

    from flashmoe.bench.resident import bench_resident
    from flashmoe.cli.console import out, print_json

    if rounds < 1:
        raise typer.BadParameter("--rounds must be at least 1")
    if max_tokens < 2:
        raise typer.BadParameter("--max-tokens must be at least 2: the first one is not decoded")
    results = bench_resident(model, max_tokens=max_tokens, rounds=rounds)
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
