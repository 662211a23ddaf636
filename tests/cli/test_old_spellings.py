"""Options that are gone or have a new name: they work, with one line on stderr."""

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from flashmoe.cli import options
from flashmoe.cli.options import OldSpelling
from tests.support.answers import BARN
from tests.support.commands import Run


def test_policy_is_ignored_with_a_note(run_cli: Run, demo_store: Any) -> None:
    arguments = ("generate", demo_store, "-p", BARN, "--max-tokens", "4")
    now, then = run_cli(*arguments), run_cli(*arguments, "--policy", "nonsense")
    assert (then.code, then.out) == (0, now.out)
    assert then.err == now.err + "--policy is gone: the bank evicts by LFU\n"
    assert "--policy" not in run_cli("generate", "--help").out


@pytest.mark.parametrize(
    ("line", "expected", "note"),
    [
        ("", (True, None), ""),
        ("--no-ahead", (False, None), "--no-ahead is now --no-warm-start\n"),
        ("--window 5", (True, 5), "--window is now --context\n"),
    ],
)
def test_new_names(
    line: str, expected: tuple[Any, ...], note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spellings = {
        "--no-ahead": OldSpelling(
            "--no-ahead is now --no-warm-start", field="warm_start", value=False
        ),
        "--window": OldSpelling("--window is now --context", kind=int, field="context"),
    }
    monkeypatch.setattr(options, "OLD_SPELLINGS", spellings)
    seen = []

    @options.with_engine_options
    def command(*, engine: options.EngineOptions) -> None:
        seen.append((engine.warm_start, engine.context))

    app = typer.Typer(add_completion=False)
    app.command()(command)
    result = CliRunner().invoke(app, line.split())
    assert (result.exit_code, result.stderr, seen) == (0, note, [expected])


def test_spelling_of_an_option_that_a_command_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    spelling = OldSpelling("--window is now --context", kind=int, field="context")
    monkeypatch.setattr(options, "OLD_SPELLINGS", {"--window": spelling})

    @options.with_engine_options_but("context")
    def command(*, engine: options.EngineOptions) -> None: ...

    app = typer.Typer(add_completion=False)
    app.command()(command)
    assert CliRunner().invoke(app, ["--window", "5"]).exit_code == 2
