"""`flashmoe trace`: which experts a model's tokens are routed to, into a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flashmoe.base.units import format_count, format_size
from flashmoe.cli import options


@options.with_engine_options
def trace(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A store, a checkpoint folder or a Hub id.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts, one per line. Default: a few questions for the demo model.",
            show_default=False,
        ),
    ] = None,
    *,
    engine: options.EngineOptions,
    max_tokens: options.MaxTokens = 128,
    temp: options.Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Makes sampling repeatable.")] = 0,
    no_template: options.NoTemplate = False,
    json: options.Json = False,
) -> None:
    """Answer prompts and record the routing, for flashmoe bench cache.

    Every prompt is a conversation of its own. Example:
    flashmoe trace demo.flashmoe demo.trace --prompts questions.txt
    """
    from flashmoe.bench.prompts import QUESTIONS, read_prompts
    from flashmoe.cli.console import late_progress, print_json
    from flashmoe.cli.console import out as console
    from flashmoe.generation.session import Sampling, check_max_tokens

    check_max_tokens(max_tokens)
    sampling = Sampling(temp, seed=seed)
    texts = QUESTIONS if prompts is None else read_prompts(prompts)
    loaded = options.load(model, engine, quiet=json)
    from flashmoe.bench.trace import record_routing

    with loaded, late_progress("answering", quiet=json) as progress:
        summary = record_routing(
            loaded,
            texts,
            out,
            max_tokens=max_tokens,
            sampling=sampling,
            template=not no_template,
            progress=progress,
        )
    if json:
        print_json(asdict(summary))
        return
    console.print(
        f"{summary.trace}: {summary.prompts} prompts, {summary.tokens} tokens "
        f"({summary.prompt_tokens} of prompts), {format_count(summary.accesses)} routed experts "
        f"in {summary.layers} layers, {format_size(summary.file_bytes)}",
        markup=False,
    )
