"""`flashmoe eval`: what quantizing cost, measured against a reference."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashmoe.base.errors import PromptError
from flashmoe.base.units import format_size
from flashmoe.cli import options

if TYPE_CHECKING:
    from flashmoe.store.reader import Store


@options.with_engine_options
def eval(
    store: Annotated[
        str, typer.Argument(metavar="STORE", help="A store, a checkpoint folder or a Hub id.")
    ],
    against: Annotated[
        str,
        typer.Option(
            metavar="STORE|CHECKPOINT",
            help="The reference; a checkpoint counts with its own weights, unquantized.",
        ),
    ],
    text: Annotated[Path, typer.Option(metavar="FILE", help="What both read.")],
    window: Annotated[
        int,
        typer.Option(metavar="TOKENS", help="The text is read in windows, each on its own."),
    ] = 512,
    tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Read no more. Default: all.", show_default=False),
    ] = None,
    *,
    engine: options.EngineOptions,
    json: options.Json = False,
) -> None:
    """Compare a model's next-token distributions with a reference's, token by token.

    Prints both perplexities, KL(reference || model) and how often both find the same token
    likeliest. The models run one after the other; the reference's logits wait in a temporary file.
    """
    from flashmoe.bench.eval import evaluate
    from flashmoe.cli.console import late_progress, out, print_json
    from flashmoe.engine.options import Options

    chosen = Options(**vars(engine))
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PromptError(f"{text} is not valid UTF-8") from None
    reference = _open(against, None if _is_store(against) else "as-is", json)
    model = _open(store, None, json)
    with late_progress("evaluating", quiet=json) as progress:
        result = evaluate(
            model,
            reference,
            content,
            options=chosen,
            window=window,
            max_tokens=tokens,
            progress=progress,
        )
    if json:
        print_json(asdict(result))
        return
    found = result.divergence
    rows = [
        ("model", f"{result.model}  {format_size(result.model_bytes)}"),
        ("reference", f"{result.reference}  {format_size(result.reference_bytes)}"),
        ("tokens", f"{found.tokens}, in windows of {result.window}"),
        (
            "perplexity",
            f"{found.perplexity:.4f}, reference {found.reference_perplexity:.4f} "
            f"({found.perplexity / found.reference_perplexity - 1:+.2%})",
        ),
        (
            "KL",
            f"mean {found.kl_mean:.5f} ± {found.kl_error:.5f}, 99th percentile "
            f"{found.kl_p99:.4f}, largest {found.kl_max:.3f} nats",
        ),
        ("top-1", f"{found.agreement:.2%} the same"),
    ]
    for name, value in rows:
        out.print(f"{name:<11} {value}", markup=False)


def _is_store(path: str) -> bool:
    from flashmoe.store.reader import is_incomplete, is_store

    folder = Path(path).expanduser()
    return is_store(folder) or is_incomplete(folder)


def _open(model: str, recipe: str | None, quiet: bool) -> Store:
    from flashmoe.cli.console import byte_progress
    from flashmoe.engine.model_cache import open_model

    with byte_progress("repacking", quiet) as progress:
        return open_model(model, recipe=recipe, progress=progress)
