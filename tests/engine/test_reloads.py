"""Loading and closing again and again: the process stays as large as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHILD = """
import sys
from flashmoe import FlashMoEModel
from flashmoe.base import machine

for count in range(1, 101):
    with FlashMoEModel.from_pretrained(sys.argv[1], cache="2MB") as model:
        pass
    if count == 10:
        tenth = machine.resident_set_bytes()
print(tenth, machine.resident_set_bytes())
"""


def test_a_hundred_loads_grow_the_process_by_less_than_two_percent(demo_store: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(demo_store)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tenth, last = map(int, done.stdout.split())
    assert last < 1.02 * tenth
