"""`flashmoe bench kernels`: products with packed weights, beside MLX and copies of memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from flashmoe.cli import options


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
