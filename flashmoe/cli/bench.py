"""`flashmoe bench`: measurements that print a figure beside what it could be."""

from __future__ import annotations

import typer

from flashmoe.cli.bench_decode import decode
from flashmoe.cli.bench_io import io
from flashmoe.cli.bench_kernels import kernels
from flashmoe.cli.bench_resident import resident

app = typer.Typer(
    help="Measure this machine and this engine.", add_completion=False, rich_markup_mode=None
)
for command in (decode, resident, kernels, io):
    app.command()(command)


@app.callback()
def _root() -> None:
    """Measure this machine and this engine."""
