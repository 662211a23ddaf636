"""Every command's help, and what the command line says of itself."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import flashmoe
from flashmoe.cli.main import app
from tests.support.commands import FLASHMOE, Result, Run

COMMANDS = [command.callback.__name__ for command in app.registered_commands]
GROUPS = {group.name: group.typer_instance for group in app.registered_groups}
SUBCOMMANDS = [
    f"{name} {command.callback.__name__}"
    for name, group in GROUPS.items()
    for command in group.registered_commands
]


def test_command_is_installed() -> None:
    assert FLASHMOE.is_file(), f"{sys.executable} has no flashmoe beside it"


@pytest.mark.parametrize("command", ["", *COMMANDS, *GROUPS, *SUBCOMMANDS])
def test_help_answers_in_half_a_second(command: str, home: Path) -> None:
    line = [str(FLASHMOE), *command.split(), "--help"]
    before = processor_seconds()
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    # Not by the clock on the wall: other tests may have the cores.
    assert processor_seconds() - before < 0.5
    assert done.stderr == ""
    assert done.stdout.startswith(f"Usage: flashmoe {command or '[OPTIONS]'}")


def processor_seconds() -> float:
    """What this process's ended children have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_flashmoe_alone_prints_help(run_cli: Run) -> None:
    result = run_cli()
    assert (result.code, result.err) == (0, "")
    assert result.out == run_cli("--help").out == run_cli("-h").out
    for command in (*COMMANDS, *GROUPS):
        assert f"\n  {command} " in result.out


def test_version(run_cli: Run) -> None:
    assert run_cli("--version") == Result(0, f"flashmoe {flashmoe.__version__}\n", "")
