"""`flashmoe chat` as a person meets it: in a pseudo-terminal, with Ctrl-C and line editing."""

import contextlib
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path

import pytest

from tests.support.commands import FLASHMOE, Run

# Makes the pseudo-terminal the one that Ctrl-C comes from, then becomes flashmoe.
LAUNCH = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r|\a")
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
# Samples nearly evenly, so that no end of turn comes soon.
ENDLESS = ("--no-template", "--max-tokens", "1000", "--temp", "10", "--seed", "1")
STATS_LINE = (
    r"(?P<tokens>\d+) tokens · [\d.]+ tok/s · first token [\d.]+ s · hit rate \d+% · "
    r"[\d.]+ [kM]?B read/token · bank (?P<bank>[\d.]+ MB) · peak memory [\d.]+ MB\n"
)
TIMES = "".join(
    rf"{part} [\d.]+ s: attention and router \d+% · waiting for reads \d+% · experts \d+% · "
    r"host \d+%\n"
    for part in ("prefill", "decode")
)
DETAILS_LINES = (
    r"(?P<prompt>\d+) prompt tokens \((?P<cached>\d+) cached\) · \d+ hits · \d+ misses · "
    r"[\d.]+ [kM]?B read of [\d.]+ [kM]?B demanded\n" + TIMES
)


class Terminal:
    """A program in a pseudo-terminal of 200 columns; what it prints is read without colours."""

    def __init__(self, *command: str, env: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", LAUNCH, *command],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                start_new_session=True,
                env={**env, "TERM": "xterm", "INPUTRC": os.devnull},
            )
        finally:
            os.close(slave)
        self._raw = b""
        self._seen = 0

    def send(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def expect(self, pattern: str, seconds: float = 20.0) -> re.Match[str]:
        """Wait until the pattern shows up behind what was expected before."""
        deadline = time.monotonic() + seconds
        while True:
            text = self._text()
            match = re.search(pattern, text[self._seen :])
            if match is not None:
                self._seen += match.end()
                return match
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"no {pattern!r} after {text[self._seen :]!r}")

    def leave(self, seconds: float = 10.0) -> int:
        """The exit code, once the program has ended by itself."""
        deadline = time.monotonic() + seconds
        while self._read(deadline - time.monotonic()):
            pass
        return self._process.wait(max(deadline - time.monotonic(), 0.1))

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._master)

    def _read(self, seconds: float) -> bool:
        """Read some more; False when time is up or the program has ended."""
        ready, _, _ = select.select([self._master], [], [], max(seconds, 0))
        if not ready:
            return False
        try:
            more = os.read(self._master, 65536)
        except OSError:  # how Linux says that the other end is closed
            return False
        self._raw += more
        return bool(more)

    def _text(self) -> str:
        text = self._raw.decode(errors="replace")
        # An escape sequence that has not arrived in full must not count as text.
        start = text.rfind("\x1b")
        if start >= 0 and not ESCAPES.match(text, start):
            text = text[:start]
        return ESCAPES.sub("", text)


@pytest.fixture
def open_chat(home: Path, demo_store: Path) -> Iterator[Callable[..., Terminal]]:
    """`open_chat(*options)` starts `flashmoe chat` on the demo store and waits for its prompt."""
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> Terminal:
            command = (str(FLASHMOE), "chat", str(demo_store), *options)
            terminal = Terminal(*command, env={**os.environ, "HOME": str(home)})
            stack.callback(terminal.close)
            terminal.expect(r"demo \(qwen3_moe\)\n")
            terminal.expect(r"(.*) of experts on disk, .*; /help for commands\n> ")
            return terminal

        yield start


def test_conversation(open_chat: Callable[..., Terminal], home: Path) -> None:
    chat = open_chat("--cache", "2MB", "--stats")
    chat.send("Hello\n")
    chat.expect(r"^Hello\nHello! Ask me what a word means\.\n")
    line = chat.expect(STATS_LINE)
    assert line["tokens"] == "10"
    assert 1.9 < float(line["bank"].split()[0]) <= 2.0
    assert chat.expect(DETAILS_LINES)["prompt"] == "11"

    # The second turn feeds the end of the first answer and the new question, nothing twice.
    chat.expect("^> $")
    chat.send("What is a barn?\n")
    chat.expect(r"^What is a barn\?\n.+\n")
    chat.expect(STATS_LINE)
    counts = chat.expect(DETAILS_LINES)
    assert 11 <= int(counts["prompt"]) - int(counts["cached"]) <= 20

    chat.expect("^> $")
    chat.send("/stats\n")
    totals = chat.expect(
        r"(?P<prompt>\d+) prompt tokens · \d+ generated · \d+ hits · (?P<misses>\d+) misses · "
        r"hit rate \d+% · [\d.]+ MB read of [\d.]+ MB demanded\n" + TIMES
    )
    assert 22 <= int(totals["prompt"]) <= 31
    assert int(totals["misses"]) > 0

    # Line editing: two lines up is the question about the barn, three is Hello.
    chat.expect("^> $")
    chat.send("/reset\n")
    chat.expect("conversation forgotten\n> $")
    chat.send(4 * UP + "\n")
    chat.expect(r"Hello\nHello! Ask me what a word means\.\n")
    chat.expect(STATS_LINE)

    chat.expect("> $")
    chat.send("/help\n")
    chat.expect(r"/help +this list\n/reset .*\n/stats .*\n/exit .*\nCtrl-C .*\n> $")
    chat.send("/nonsense\n")
    chat.expect(r"/nonsense is no command\n/help .*\n")
    chat.expect("> $")
    chat.send("\n")
    chat.expect("^\n> $")
    chat.send("/exit\n")
    assert chat.leave() == 0
    history = (home / ".cache/flashmoe/chat_history").read_text()
    assert history.endswith(
        "Hello\nWhat is a barn?\n/stats\n/reset\nHello\n/help\n/nonsense\n/exit\n"
    )


def test_ctrl_c_stops_an_answer_and_no_more(open_chat: Callable[..., Terminal], home: Path) -> None:
    chat = open_chat(*ENDLESS)
    for question in ("Once", "Twice"):
        chat.send(f"{question}\n")
        chat.expect(rf"^{question}\n(?s:.{{20}})")
        chat.send(CTRL_C)
        chat.expect(r" \(stopped\)\n")
        assert 0 < int(chat.expect(STATS_LINE)["tokens"]) < 1000
        chat.expect("^> $")
    # Once the line shows, the program is waiting for keys and not on its way there.
    chat.send("half a li")
    chat.expect("^half a li$")
    chat.send(CTRL_C)
    chat.expect(r"\(Ctrl-D or /exit leaves\)\n> $")
    chat.send("/stats\n")
    chat.expect(r"\d+ generated")
    chat.expect("> $")
    chat.send(CTRL_D)
    assert chat.leave() == 0

    # The history outlives the program.
    assert (home / ".cache/flashmoe/chat_history").read_text().endswith("Once\nTwice\n/stats\n")
    again = open_chat()
    again.send(UP)
    again.expect("/stats$")
    again.send("\n")
    again.expect("^\n0 prompt tokens · 0 generated")
    again.expect("> $")
    again.send(CTRL_D)
    assert again.leave() == 0


def test_chat_answers_piped_lines(run_process: Run, demo_store: Path) -> None:
    result = run_process("chat", demo_store, stdin=b"Hello\n\n/stats\nHello\n")
    assert (result.code, result.err) == (0, "")
    assert result.out.count("Hello! Ask me what a word means.\n") == 2
    assert len(re.findall(STATS_LINE, result.out)) == 2
    assert "11 prompt tokens" in result.out


def test_piped_chat_keeps_the_history(run_cli: Run, home: Path, demo_store: Path) -> None:
    history = home / ".cache/flashmoe/chat_history"
    history.parent.mkdir(parents=True)
    history.write_text("an older line\n")
    assert run_cli("chat", demo_store, stdin=b"/exit\n").code == 0
    assert history.read_text().startswith("an older line\n")


def test_ctrl_c_right_after_an_answer_does_not_leave(
    run_cli: Run, demo_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object) -> str:
        signal.raise_signal(signal.SIGINT)
        return "stats"

    monkeypatch.setattr("flashmoe.cli.console.AnswerSummary.line", interrupted)
    result = run_cli("chat", demo_store, stdin=b"Hello\n/help\n")
    assert (result.code, result.err) == (0, "")
    assert "/reset  forget the conversation" in result.out


def test_question_that_does_not_fit_does_not_leave(run_cli: Run, demo_store: Path) -> None:
    long = b"What is a barn, and what is a scent, and what is the capital of France?\n"
    result = run_cli("chat", demo_store, "--context", "24", stdin=long + b"Hello\n")
    assert result.code == 0
    assert re.fullmatch(r"flashmoe: the prompt has \d+ tokens but .*\n", result.err)
    assert "Hello! Ask me what a word means.\n" in result.out


def test_line_that_is_no_text_does_not_leave(run_cli: Run, demo_store: Path) -> None:
    result = run_cli("chat", demo_store, stdin=b"caf\xe9\nHello\n")
    assert result.code == 0
    assert re.fullmatch(r"flashmoe: .*UTF-8.*\n", result.err)
    assert "Hello! Ask me what a word means.\n" in result.out


def test_system_prompt_survives_reset(run_cli: Run, demo_store: Path) -> None:
    asked = ("chat", demo_store, "--system", "Be brief.", "--stats", "--max-tokens", "4")
    result = run_cli(*asked, stdin=b"Hello\n/reset\nHello\n")
    assert (result.code, result.err) == (0, "")
    found = re.findall(r"(\d+) prompt tokens \((\d+) cached\)", result.out)
    (first, none), (second, cached) = [tuple(map(int, counts)) for counts in found]
    # The second prompt is the first one again: only its last token is fed.
    assert (none, second, cached) == (0, first, first - 1)
    assert first > 11


def test_no_template_continues_the_transcript(run_cli: Run, demo_store: Path) -> None:
    asked = ("chat", demo_store, "--no-template", "--stats", "--max-tokens", "4")
    result = run_cli(*asked, stdin=b"Hello\nHello\n")
    assert (result.code, result.err) == (0, "")
    found = re.findall(r"(\d+) prompt tokens \((\d+) cached\)", result.out)
    fed = [int(prompt) - int(cached) for prompt, cached in found]
    assert len(fed) == 2
    assert fed[1] <= fed[0] + 4
