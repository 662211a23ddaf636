"""`flashmoe generate`: one prompt, one answer."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from flashmoe.base.errors import PromptError
from flashmoe.cli import options


@options.with_engine_options
def generate(
    model: options.Model = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="The prompt; - reads standard input.",
            show_default=False,
        ),
    ] = None,
    *,
    engine: options.EngineOptions,
    max_tokens: options.MaxTokens = 256,
    temp: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    system: options.System = None,
    no_template: options.NoTemplate = False,
    stats: options.ShowStats = False,
    json: options.Json = False,
) -> None:
    """Answer one prompt, streaming.

    Example: flashmoe generate -p "What is a barn?" --cache 2MB --stats
    """
    if prompt is None:
        raise typer.BadParameter("give a prompt with -p TEXT, or -p - for standard input")
    text = _read_stdin() if prompt == "-" else prompt
    from flashmoe.cli.console import AnswerSummary, late_progress, print_dim, print_json
    from flashmoe.generation.session import Sampling, check_max_tokens

    check_max_tokens(max_tokens)
    sampling = Sampling(temp, top_p, top_k, min_p, seed)
    loaded = options.load(model, engine, quiet=json)
    pieces = []
    with loaded, late_progress("reading prompt", quiet=json) as progress:
        started = time.perf_counter()
        first_token = 0.0
        stream = loaded.session().stream(
            text,
            max_new_tokens=max_tokens,
            sampling=sampling,
            system=system,
            template=not no_template,
            progress=progress,
        )
        try:
            for piece in stream:
                first_token = first_token or time.perf_counter() - started
                pieces.append(piece)
                if not json:
                    print(piece.text, end="", flush=True)
        finally:
            # Also when it is cut short: whatever is said next starts on a line of its own.
            if pieces and not json:
                print()
        summary = AnswerSummary.of(loaded, pieces[-1].report, first_token)
    if json:
        print_json(
            {
                "text": "".join(piece.text for piece in pieces),
                "tokens": [piece.token for piece in pieces if piece.token is not None],
                "finish_reason": pieces[-1].finish_reason,
                "stats": summary.as_dict(),
            }
        )
        return
    if stats:
        print_dim(summary.line())
        for line in summary.details():
            print_dim(line)


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise PromptError("standard input is not valid UTF-8") from None
