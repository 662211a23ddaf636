"""What shows only when the installed command runs in a process of its own."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.answers import CAPITAL, CAPITAL_ANSWER
from tests.support.commands import FLASHMOE, Result, Run, assert_one_line


def test_unknown_command(run_process: Run) -> None:
    assert_one_line(run_process("nonsense"), 2, "nonsense")


def test_hub_id_offline(run_process: Run) -> None:
    result = run_process("generate", "owner/name", "-p", "x", env={"HF_HUB_OFFLINE": "1"})
    assert_one_line(result, 1, "owner/name")


def test_too_little_memory_names_the_least(run_process: Run, demo_store: Path) -> None:
    question = ("generate", demo_store, "-p", CAPITAL, "--memory")
    refused = run_process(*question, "60MB")
    assert_one_line(refused, 1, "60.0 MB")
    least = re.search(r"the least that fits is (\d+[kMG]?B)$", refused.err.strip())
    assert least is not None, refused.err
    assert run_process(*question, least[1]) == Result(0, f"{CAPITAL_ANSWER}\n", "")


def test_a_reader_that_leaves_is_no_error_to_report(home: Path, places: dict[str, Path]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [str(FLASHMOE), "inspect", str(places["store"])],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_another_encoding(encoding: str, run_process: Run, places: dict[str, Path]) -> None:
    result = run_process("inspect", places["store"], env={"PYTHONIOENCODING": encoding})
    assert (result.code, result.err) == (0, "")
    assert "mixtral, 350K parameters" in result.out


def test_reads_a_line_from_stdin(run_process: Run, demo_store: Path) -> None:
    # The newline is echo's, not part of the question.
    question = ("generate", demo_store, "-p", "-", "--cache", "2MB")
    assert run_process(*question, stdin=f"{CAPITAL}\n".encode()) == Result(
        0, f"{CAPITAL_ANSWER}\n", ""
    )


def test_interrupt_while_answering(home: Path, demo_store: Path) -> None:
    endless = ["--no-template", "--temp", "10", "--seed", "1", "--max-tokens", "2000"]
    with subprocess.Popen(
        [str(FLASHMOE), "generate", str(demo_store), "-p", "Once", *endless],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.decode().strip() == "flashmoe: interrupted"
