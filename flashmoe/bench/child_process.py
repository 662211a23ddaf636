"""A process of its own for what is measured, on both sides of the pipe.

The child (`python -m flashmoe.bench.child_process`) gets a function and its argument as JSON on
standard input and answers with lines of JSON: `{"share": 0.5}`, then `{"result": ...}`, or else
`{"error": [kind, text]}`. Knows nothing about what runs in it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from flashmoe.base.errors import FlashMoEError, OptionError
from flashmoe.base.progress import ShareProgress
from flashmoe.bench.cgroup import memory_cgroup

# Between two reports of progress.
SAY_SECONDS = 0.5


def run_apart(
    function: Callable[[Any, ShareProgress], Any],
    argument: Any,
    *,
    cgroup_bytes: int | None = None,
    progress: ShareProgress = lambda share: None,
) -> Any:
    """What `function(argument, progress)` returns in a fresh process, argument and result being
    JSON, and the function one of a module's.

    The process is in a memory cgroup of `cgroup_bytes` if there is one. `progress` is told which
    share is done. Raises OptionError or FlashMoEError with what the child says, FlashMoEError
    when it ends in another way, and CgroupError; the child does not outlive the call.
    """
    with contextlib.ExitStack() as stack:
        entrance = None
        if cgroup_bytes is not None:
            entrance = str(stack.enter_context(memory_cgroup(cgroup_bytes)))
        said = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        # A session of its own: Ctrl-C is for this process, which then ends the child.
        child = subprocess.Popen(
            [sys.executable, "-m", "flashmoe.bench.child_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        )
        stack.callback(_end, child)
        assert child.stdin is not None
        task = {
            "entrance": entrance,
            "function": [function.__module__, function.__name__],
            "argument": argument,
        }
        with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
            pipe.write(json.dumps(task).encode())
        assert child.stdout is not None
        for line in child.stdout:
            message = json.loads(line)
            if "share" in message:
                progress(message["share"])
            elif "error" in message:
                kind, text = message["error"]
                raise OptionError(text) if kind == "OptionError" else FlashMoEError(text)
            else:
                return message["result"]
        raise FlashMoEError(_why(child.wait(), said, cgroup_bytes))


def _why(code: int, said: IO[str], cgroup_bytes: int | None) -> str:
    """Why a process ended without figures."""
    if code == -signal.SIGKILL:
        return "the measured process was killed, as happens without memory" + (
            "" if cgroup_bytes is None else "; is the cgroup smaller than --memory?"
        )
    said.seek(0)
    last = said.read().strip().splitlines()[-1:]
    return f"the measured process ended with {last[0] if last else f'code {code}'}"


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.kill()
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def main() -> None:
    """The child."""
    # Libraries may print; what they print goes elsewhere.
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # At once, or it would come behind what ends the process.
    sys.stdout = sys.stderr
    said = 0.0

    def say(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")

    def progress(share: float) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SAY_SECONDS:
            said = now
            say({"share": share})

    try:
        task = json.load(sys.stdin)
        if task["entrance"] is not None:
            Path(task["entrance"]).write_text(str(os.getpid()))
        module, name = task["function"]
        # Only now: what is allocated from here on counts.
        function = getattr(importlib.import_module(module), name)
        say({"result": function(task["argument"], progress)})
    except FlashMoEError as error:
        say({"error": [type(error).__name__, str(error)]})
    except OSError as error:
        say({"error": ["OSError", f"{error.filename or 'the system'}: {error.strerror or error}"]})


if __name__ == "__main__":
    main()
