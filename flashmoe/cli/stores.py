"""`flashmoe repack`, `flashmoe inspect` and `flashmoe verify`."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from flashmoe.base.units import format_count, format_duration, format_size
from flashmoe.cli import options

if TYPE_CHECKING:
    from flashmoe.store.inspect import StoreSummary


def repack(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A checkpoint folder or a Hub id.")
    ],
    dest: Annotated[
        str | None,
        typer.Argument(
            metavar="DEST",
            help="Where the store goes. Default: NAME.flashmoe here.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="2|3|4|5|6|8|16|32",
            help="Bits per weight of a float checkpoint; 16 and 32 keep floats. Default: 4.",
            show_default=False,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="32|64|128",
            help="Weights that share a scale. Default: 64.",
            show_default=False,
        ),
    ] = None,
    resident_bits: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Bits for everything but the experts. Default: as --bits.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="rtn|hqq",
            help="Round to nearest, or fit scales and biases to the weights (slower, closer). "
            "Default: as the recipe, or rtn.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.toml",
            help="Bits, group, mode and method part by part: 4-bit, 8-bit, 3-bit (experts 3, "
            "down 4, rest 8), 2-bit (experts 2, rest 4), as-is, or a file.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the size of each part; write nothing.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="REV", help="Branch, tag or commit on the Hub.", show_default=False),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace a complete store; begin an unfinished one again."),
    ] = False,
    consume: Annotated[
        bool,
        typer.Option("--consume", help="Delete each weight file once the store has all of it."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before --consume.")] = False,
    json: options.Json = False,
) -> None:
    """Turn a checkpoint into a store that streams.

    Quantized MLX checkpoints are repacked bit for bit; float ones are quantized. A model on the
    Hub is fetched piece by piece, and nothing of it is kept but the store. The store looks
    complete only once it is; the same command goes on where an interrupted one stopped.
    """
    if consume and not yes:
        _ask_before_consuming(source)
    from flashmoe.cli.console import byte_progress, out, print_json

    packing: dict[str, Any] = {
        "bits": bits,
        "group_size": group_size,
        "resident_bits": resident_bits,
        "method": method,
        "recipe": recipe,
    }
    if dry_run:
        _print_sizes(source, revision, packing, json)
        return
    started = time.perf_counter()
    with byte_progress("repacking", quiet=json) as progress:
        from flashmoe.repacking.repack import repack as run
        from flashmoe.store.inspect import inspect as summarise

        store = run(
            source,
            dest,
            **packing,
            revision=revision,
            force=force,
            consume=consume,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    summary = summarise(store.path)
    if json:
        print_json({**asdict(summary), "seconds": seconds})
        return
    written = summary.resident_bytes + summary.streamed_bytes
    out.print(f"[bold]{escape(str(store.path))}[/bold]  {_headline(summary)}")
    out.print(
        f"{format_size(written)} in {format_duration(seconds)}; "
        f"run it with: flashmoe chat {escape(str(store.path))}"
    )


def _ask_before_consuming(source: str) -> None:
    import sys

    from flashmoe.base.errors import OptionError

    if not sys.stdin.isatty():
        raise OptionError(f"--consume deletes the weight files of {source}; confirm it with --yes")
    typer.confirm(
        f"Delete each weight file of {source} once the store has all of it?", abort=True, err=True
    )


def _print_sizes(source: str, revision: str | None, packing: dict[str, Any], json: bool) -> None:
    from rich.table import Table

    from flashmoe.cli.console import out, print_json
    from flashmoe.repacking.repack import dry_run

    sizes = dry_run(source, revision=revision, **packing)
    if json:
        print_json(asdict(sizes))
        return
    out.print(
        f"{escape(source)}  {escape(sizes.model_type)}, {format_count(sizes.parameters)} "
        "parameters; nothing is written"
    )
    table = Table()
    for column in ("part", "size", "matrices"):
        table.add_column(column, no_wrap=True)
    for part in sizes.parts:
        kinds = ", ".join(f"{count} × {name}" for name, count in part.packing.items())
        table.add_row(part.part, format_size(part.bytes), escape(kinds))
    out.print(table)
    out.print(
        f"resident {format_size(sizes.resident_bytes)}, streamed "
        f"{format_size(sizes.streamed_bytes)}, per token {format_size(sizes.token_bytes)}; "
        f"{format_size(sizes.file_bytes)} on disk"
    )


def inspect(store: options.StorePath, json: options.Json = False) -> None:
    """Show what a store holds: sizes, bits and a table of its layers."""
    from rich.table import Table

    from flashmoe.cli.console import out, print_json
    from flashmoe.cli.tune import describe_choice, stored_tuning
    from flashmoe.store.inspect import inspect as summarise

    summary = summarise(store)
    tuning = stored_tuning(store)
    if json:
        print_json({**asdict(summary), "tuned": None if tuning is None else asdict(tuning)})
        return
    out.print(f"[bold]{escape(summary.path)}[/bold]  {_headline(summary)}")
    revision = f" @ {summary.source.revision}" if summary.source.revision else ""
    packing = ", ".join(f"{count} × {name}" for name, count in summary.resident_packing.items())
    rows = [
        ("source", f"{summary.source.repo}{revision}"),
        ("resident", f"{format_size(summary.resident_bytes)}  ({packing or 'not quantized'})"),
        ("streamed", f"{format_size(summary.streamed_bytes)} in {summary.records} records"),
        ("per token", f"{format_size(summary.token_bytes)} of records"),
    ]
    if tuning is not None:
        rows.append(("tuned", "; ".join(f"{what}: {how}" for what, how in describe_choice(tuning))))
    for name, value in rows:
        out.print(f"  {name:<10} {escape(value)}")
    table = Table()
    for column in ("layer", "experts", "top-k", "record", "padding", "bits"):
        table.add_column(column, no_wrap=True)
    for layer in summary.layers:
        table.add_row(
            escape(layer.path),
            str(layer.experts),
            str(layer.top_k),
            format_size(layer.record_bytes),
            f"{layer.padding_bytes / layer.record_bytes:.1%}",
            escape(_layer_packing(layer.packing)),
        )
    out.print(table)


def verify(store: options.StorePath, json: options.Json = False) -> None:
    """Re-hash a whole store; name the first file, tensor and offset that is damaged."""
    from flashmoe.cli.console import byte_progress, out, print_json
    from flashmoe.store.verify import verify as run

    started = time.perf_counter()
    with byte_progress("verifying", quiet=json) as progress:
        report = run(store, progress)
    seconds = time.perf_counter() - started
    if json:
        print_json({"ok": True, **asdict(report), "seconds": seconds})
        return
    out.print(
        f"{escape(store)} is good: {report.files} files, {format_size(report.bytes)}, "
        f"{format_size(report.bytes / max(seconds, 1e-9))}/s"
    )


def _headline(summary: StoreSummary) -> str:
    return (
        f"{escape(summary.model_type)}, {format_count(summary.parameters)} parameters, "
        f"{len(summary.layers)} MoE layers"
    )


def _layer_packing(packing: dict[str, str]) -> str:
    if len(set(packing.values())) == 1:
        return next(iter(packing.values()))
    return ", ".join(f"{name} {value}" for name, value in packing.items())
