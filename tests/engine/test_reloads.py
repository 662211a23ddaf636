"""Loading and closing again and again, and in several threads at once."""

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


TWO_THREADS = """
import faulthandler, os, sys, threading
from flashmoe import FlashMoEModel

faulthandler.dump_traceback_later(60, exit=True)

def load():
    for _ in range(10):
        FlashMoEModel.from_pretrained(sys.argv[1], cache="2MB").close()

threads = [threading.Thread(target=load) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
# At exit MLX 0.32 may abort once a model was built outside of the main thread.
os._exit(0)
"""


def test_two_threads_load_at_once(demo_store: Path) -> None:
    """Without the lock in `engine.build` they wait for each other for ever: MLX sets a limit with
    Python locked, while it waits for a thread of its own that calls Python."""
    command = [sys.executable, "-c", TWO_THREADS, str(demo_store)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
