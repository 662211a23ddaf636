"""The `flashmoe` command: one place where errors become one line and an exit code."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from flashmoe.base.errors import FlashMoEError, OptionError
from flashmoe.cli import bench
from flashmoe.cli.chat import chat
from flashmoe.cli.eval import eval
from flashmoe.cli.generate import generate
from flashmoe.cli.info import info
from flashmoe.cli.stores import inspect, repack, verify
from flashmoe.cli.tune import tune

INTERRUPTED = 130

app = typer.Typer(
    name="flashmoe",
    help="Run mixture-of-experts models far larger than memory by streaming their routed "
    "experts from the SSD. Without a MODEL, commands use the small bundled demo model.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (chat, generate, repack, inspect, verify, eval, tune, info):
    app.command()(command)
app.add_typer(bench.app, name="bench")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        import flashmoe

        print(f"flashmoe {flashmoe.__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Run the command line; expected failures print one line on stderr and exit 1 or 2."""
    # What a terminal's encoding lacks is printed as "?", and bytes that are no text come in as
    # surrogates, which prompts refuse: neither may end in a traceback.
    for stream, errors in (
        (sys.stdout, "replace"),
        (sys.stderr, "replace"),
        (sys.stdin, "surrogateescape"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            fail("interrupted", INTERRUPTED)
    except TyperException as error:
        fail(error.format_message(), error.exit_code)
    except OptionError as error:
        fail(str(error), 2)
    except FlashMoEError as error:
        fail(str(error), 1)
    except (typer.Abort, KeyboardInterrupt):
        fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output left; nothing to say and nobody to say it to.
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        fail(f"{error.filename or 'the system'}: {error.strerror or error}", 1)
    sys.exit(code if isinstance(code, int) else 0)


def fail(message: str, code: int) -> None:
    """Print a failure as one line and exit."""
    print(f"flashmoe: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
