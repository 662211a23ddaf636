"""docs/cli.md: the help of every command, as the commands print it.

python scripts/cli_docs.py           write it
python scripts/cli_docs.py --check   exit 1 when it is not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer.main
from typer.testing import CliRunner

from flashmoe.cli.main import app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
WIDTH = 88
HEAD = """# Commands

Every command with its options, as `flashmoe COMMAND --help` prints it. This page is made by
`python scripts/cli_docs.py`; a test holds it to that.
"""


def commands(command: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all commands, a group before its own."""
    inner = getattr(command, "commands", {})
    return [path, *(p for name in inner for p in commands(inner[name], (*path, name)))]


def page() -> str:
    runner = CliRunner(env={"COLUMNS": str(WIDTH), "TERMINAL_WIDTH": str(WIDTH)})
    parts = [HEAD]
    for path in commands(typer.main.get_command(app)):
        result = runner.invoke(app, [*path, "--help"], prog_name="flashmoe", terminal_width=WIDTH)
        if result.exit_code:
            raise SystemExit(result.output)
        text = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
        parts.append(f"## {' '.join(('flashmoe', *path))}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def main() -> None:
    made = page()
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() != made:
            raise SystemExit("docs/cli.md is not what the commands say: run scripts/cli_docs.py")
        return
    PAGE.write_text(made)


if __name__ == "__main__":
    main()
