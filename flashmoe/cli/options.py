"""Options that several commands share, and loading a model as they say."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from flashmoe.engine.api import FlashMoEModel

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A store, a checkpoint folder or a Hub id; the last two are repacked into "
        "~/.cache/flashmoe on first use. Without it: the demo model.",
        show_default=False,
    ),
]
PlannedModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A store, or a checkpoint folder or Hub id as repack would store it by default.",
        show_default=False,
    ),
]
StorePath = Annotated[str, typer.Argument(metavar="STORE", help="A folder that repack made.")]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for the whole process, such as 24GB. Default: three quarters of what is free.",
        show_default=False,
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE|min",
        help="Memory for the bank of experts alone; min is one token's needs.",
        show_default=False,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        help="Most tokens of prompt and answers together. Default: 4096, or the model's limit.",
        show_default=False,
    ),
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens of a prompt that are fed at once. Default: as many as memory has room for, "
        "256 to 2048.",
        show_default=False,
    ),
]
MaxTokens = Annotated[int, typer.Option(metavar="N", help="Most tokens of one answer.")]
Temperature = Annotated[
    float, typer.Option("--temp", help="Sampling temperature; 0 takes the likeliest token.")
]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total.")]
TopK = Annotated[int, typer.Option(help="Sample from this many tokens; 0 from all.")]
MinP = Annotated[
    float, typer.Option(help="Drop tokens below this share of the likeliest one's probability.")
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", show_default=False)]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="System prompt.", show_default=False)
]
NoTemplate = Annotated[
    bool, typer.Option("--no-template", help="Use the text as it is, without a chat template.")
]
Kernel = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Kernel for routed experts: auto, or one that flashmoe info lists.",
    ),
]
Reader = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="How records are read: auto, or a reader that flashmoe info lists.",
    ),
]
PageCache = Annotated[
    bool | None,
    typer.Option(
        "--page-cache/--no-page-cache",
        help="Read records through the system's page cache. Default: unless they do not fit "
        "into the memory that is left.",
        show_default=False,
    ),
]
Prefetch = Annotated[
    bool | None,
    typer.Option(
        "--prefetch/--no-prefetch",
        help="Prefetch the experts that the next layer may need, where that pays. Default: yes.",
        show_default=False,
    ),
]
Share = Annotated[
    bool,
    typer.Option("--share", help="Run although another process runs the same store."),
]
WarmStart = Annotated[
    bool,
    typer.Option(
        "--warm-start/--no-warm-start",
        help="Remember which experts were in memory at the end, and read those again while the "
        "next run begins.",
    ),
]
Tuned = Annotated[
    bool,
    typer.Option(
        "--tuned/--no-tuned",
        help="Use the settings stored by flashmoe tune for options not given.",
    ),
]
ExpertsPerToken = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="LOSSY: route every token to N experts, fewer than the model was trained with.",
        show_default=False,
    ),
]
RouteBias = Annotated[
    float,
    typer.Option(
        metavar="B",
        help="LOSSY: while decoding, prefer experts in memory whose router logit is at most B "
        "lower. Output then depends on what is in memory. 0 is off.",
    ),
]
ShowStats = Annotated[bool, typer.Option("--stats", help="Also print hits, misses and bytes read.")]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON for programs.")]


@dataclass(frozen=True)
class EngineOptions:
    """The options of `flashmoe.Options` that every command has that runs a model."""

    memory: Memory = None
    cache: Cache = None
    context: Context = None
    prefill_chunk: PrefillChunk = None
    kernel: Kernel = "auto"
    reader: Reader = "auto"
    page_cache: PageCache = None
    prefetch: Prefetch = None
    share: Share = False
    warm_start: WarmStart = True
    tuned: Tuned = True
    experts_per_token: ExpertsPerToken = None
    route_bias: RouteBias = 0.0


@dataclass(frozen=True)
class OldSpelling:
    """An option that is gone or has a new name; it works for one release more, hidden from help.

    `note` is what its user reads on stderr. `kind` is the type of its value, bool for a switch.
    It sets `field` of `EngineOptions`, to `value` if it is a switch; without a field it does
    nothing.
    """

    note: str
    kind: type = bool
    field: str | None = None
    value: Any = True


OLD_SPELLINGS = {
    "--policy": OldSpelling("--policy is gone: the bank evicts by LFU", kind=str),
    "--forecast": OldSpelling("--forecast is now --prefetch", field="prefetch", value=True),
    "--no-forecast": OldSpelling(
        "--no-forecast is now --no-prefetch", field="prefetch", value=False
    ),
}

Command = Callable[..., None]


def with_engine_options_but(*left_out: str) -> Callable[[Command], Command]:
    """A decorator: the command with the fields of `EngineOptions`, but these, in place of its
    parameter `engine`, which receives them as one object, the left out ones as their default."""

    def decorate(command: Command) -> Command:
        hints = get_type_hints(EngineOptions, include_extras=True)
        named = {
            field.name: inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in fields(EngineOptions)
            if field.name not in left_out
        }
        old = {
            f"old_{number}": (spelling, was)
            for number, (spelling, was) in enumerate(OLD_SPELLINGS.items())
            if was.field is None or was.field in named
        }
        hidden = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[was.kind | None, typer.Option(spelling, hidden=True)],
            )
            for name, (spelling, was) in old.items()
        ]
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name == "engine":
                parameters += [*named.values(), *hidden]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

        @functools.wraps(command)
        def run(**values: Any) -> None:
            chosen = {name: values.pop(name) for name in named}
            for name, (_, was) in old.items():
                given = values.pop(name)
                if given is None:
                    continue
                print(was.note, file=sys.stderr)
                if was.field is not None:
                    chosen[was.field] = was.value if was.kind is bool else given
            command(**values, engine=EngineOptions(**chosen))

        # What typer asks a command for.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


with_engine_options = with_engine_options_but()


def load(model: str | None, engine: EngineOptions, *, quiet: bool = False) -> FlashMoEModel:
    """Load a model, with a progress bar while it is repacked on first use."""
    from flashmoe.cli.console import byte_progress
    from flashmoe.engine.api import FlashMoEModel
    from flashmoe.engine.model_cache import open_model
    from flashmoe.engine.options import Options

    # Before anything is fetched.
    options = Options(**vars(engine))
    with byte_progress("repacking", quiet) as progress:
        store = open_model(model, progress=progress)
    return FlashMoEModel(store, options)
