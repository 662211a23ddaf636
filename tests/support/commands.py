"""The command line as a person meets it: what a command printed, and its exit code."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLASHMOE = Path(sys.executable).with_name("flashmoe")


@dataclass(frozen=True)
class Result:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The one line of JSON that is all of stdout, from a command that worked."""
        assert (self.code, self.err) == (0, "")
        line, end, rest = self.out.partition("\n")
        assert (end, rest) == ("\n", "")
        return json.loads(line)


Run = Callable[..., Result]


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    """The command failed with this code and one line on stderr that says all of `parts`."""
    assert (result.code, result.out) == (code, "")
    assert re.fullmatch(r"flashmoe: [^\n]+\n", result.err), result.err
    for part in parts:
        assert part in result.err
