"""A process of its own per point, on both sides of the pipe.

The child (`python -m flashmoe.bench.child`) gets a point as JSON on standard input and answers
with lines of JSON: `{"share": 0.5}`, then `{"run": ...}`, or else `{"error": [kind, text]}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.bench.cgroup import memory_cgroup
from flashmoe.errors import FlashMoEError, OptionError

if TYPE_CHECKING:
    from flashmoe.bench.point import Point, PointRun

# Between two reports of progress.
PATIENCE_SECONDS = 0.5
INTERRUPTED = 130


def run_in_child(
    point: Point, *, cgroup_bytes: int | None, progress: Callable[[float], None]
) -> PointRun:
    """Run a point in a fresh process, in a memory cgroup of that size if there is one.

    `progress` is told which share of it is done. Raises OptionError or FlashMoEError with what
    the child says, and CgroupError; the child does not outlive the call.
    """
    from flashmoe.bench.point import Pass, PointRun

    with contextlib.ExitStack() as stack:
        entrance = None
        if cgroup_bytes is not None:
            entrance = str(stack.enter_context(memory_cgroup(cgroup_bytes)))
        child = subprocess.Popen(
            [sys.executable, "-m", "flashmoe.bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(_end, child)
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
            json.dump({"entrance": entrance, "point": asdict(point)}, pipe)
        for line in child.stdout:
            message = json.loads(line)
            if "share" in message:
                progress(message["share"])
            elif "error" in message:
                kind, text = message["error"]
                raise OptionError(text) if kind == "OptionError" else FlashMoEError(text)
            else:
                run = message["run"]
                return PointRun(**{**run, "passes": [Pass(**taken) for taken in run["passes"]]})
        code = child.wait()
        if code == -signal.SIGKILL:
            raise FlashMoEError(
                "the measured process was killed, as happens without memory"
                + ("" if cgroup_bytes is None else "; is the cgroup smaller than --memory?")
            )
        raise FlashMoEError(f"the measured process ended with code {code} and without figures")


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        child.terminate()
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def main() -> None:
    """The child."""
    # Libraries may print; what they print goes elsewhere.
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    said = 0.0

    def say(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")

    def progress(share: float) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= PATIENCE_SECONDS:
            said = now
            say({"share": share})

    try:
        asked = json.load(sys.stdin)
        if asked["entrance"] is not None:
            Path(asked["entrance"]).write_text(str(os.getpid()))
        # Only now: what is allocated from here on counts.
        from flashmoe.bench.point import Point, run_point

        say({"run": asdict(run_point(Point(**asked["point"]), progress))})
    except FlashMoEError as error:
        say({"error": [type(error).__name__, str(error)]})
    except OSError as error:
        say({"error": ["OSError", f"{error.filename or 'the system'}: {error.strerror or error}"]})
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
