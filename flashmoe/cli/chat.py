"""`flashmoe chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.cli import options
from flashmoe.errors import FlashMoEError

if TYPE_CHECKING:
    from flashmoe.engine import FlashMoEModel
    from flashmoe.generation.session import Sampling

HELP = """\
/help   this list
/reset  forget the conversation
/stats  totals since the start
/exit   leave (or Ctrl-D)
Ctrl-C stops an answer."""


def chat(
    model: options.Model = None,
    memory: options.Memory = None,
    cache: options.Cache = None,
    context: options.Context = None,
    max_tokens: options.MaxTokens = 1024,
    temp: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    system: options.System = None,
    no_template: options.NoTemplate = False,
    kernel: options.Kernel = "auto",
    stats: options.ShowStats = False,
) -> None:
    """Chat with a model; type /help inside for commands.

    Example: flashmoe chat Qwen/Qwen3-30B-A3B --memory 12GB
    """
    from flashmoe.cli.console import out, print_dim
    from flashmoe.generation.session import Sampling
    from flashmoe.units import format_size

    sampling = Sampling(temp, top_p, top_k, min_p, seed)
    loaded = options.load(model, memory=memory, cache=cache, context=context, kernel=kernel)
    with loaded:
        manifest = loaded.store.manifest
        slots = sum(loaded.memory_plan.slots)
        experts = sum(layer.layout.n_experts for layer in manifest.layers)
        out.print(f"[bold]{manifest.source.repo}[/bold] ({manifest.model_type})")
        print_dim(
            f"{format_size(manifest.streamed_bytes)} of experts on disk, {slots} of {experts} "
            f"fit the bank of {format_size(loaded.bank_bytes)}; /help for commands"
        )
        talk = _Conversation(loaded, sampling, system, not no_template, max_tokens, stats)
        with _line_editing():
            while talk.turn():
                pass


class _Conversation:
    """The messages so far and the session that has seen them."""

    def __init__(
        self,
        model: FlashMoEModel,
        sampling: Sampling,
        system: str | None,
        template: bool,
        max_tokens: int,
        show_details: bool,
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._system = system
        self._template = template and model.tokenizer.has_chat_template
        self._max_tokens = max_tokens
        self._show_details = show_details
        self._session = model.session()
        self._messages: list[dict[str, Any]] = []
        self._transcript = ""
        self.reset()

    def reset(self) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        self._messages = system if self._template else []
        self._transcript = "" if self._template or not self._system else f"{self._system}\n"

    def turn(self) -> bool:
        """Read a line and act on it; False when the user leaves."""
        from flashmoe.cli.console import err

        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return False
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)")
            return True
        if line == "/exit":
            return False
        if line.startswith("/"):
            self._command(line)
        elif line:
            try:
                self._answer(line)
            except FlashMoEError as error:
                err.print(f"flashmoe: {error}", markup=False)
        return True

    def _command(self, line: str) -> None:
        from flashmoe.cli.console import print_dim
        from flashmoe.units import format_size

        if line == "/help":
            print(HELP)
        elif line == "/reset":
            self.reset()
            print_dim("conversation forgotten")
        elif line == "/stats":
            stats = self._model.stats()
            seconds = stats.seconds
            print_dim(
                f"{stats.prompt_tokens} prompt tokens · {stats.tokens} generated · "
                f"{stats.hits} hits · {stats.misses} misses · hit rate {stats.hit_rate:.0%} · "
                f"{format_size(stats.bytes_read)} read of "
                f"{format_size(stats.bytes_demanded)} demanded"
            )
            print_dim(
                f"prefill {seconds.prefill:.1f} s · decode {seconds.decode:.1f} s · of both: "
                f"reading {seconds.reading:.1f} s · computing {seconds.computing:.1f} s"
            )
        else:
            print(f"{line} is no command\n{HELP}")

    def _answer(self, line: str) -> None:
        from flashmoe.cli.console import AnswerReport, print_dim, prompt_progress

        question = {"role": "user", "content": line}
        prompt: Any = [*self._messages, question] if self._template else self._transcript + line
        before = self._model.stats()
        started = time.perf_counter()
        first_token = 0.0
        text = ""
        with _stop_on_interrupt() as stopped, prompt_progress() as progress:
            for piece in self._session.stream(
                prompt,
                max_new_tokens=self._max_tokens,
                sampling=self._sampling,
                template=self._template,
                progress=progress,
                should_stop=lambda: bool(stopped),
            ):
                first_token = first_token or time.perf_counter() - started
                text += piece.text
                print(piece.text, end="", flush=True)
        print(" (stopped)" if stopped else "")
        self._messages += [question, {"role": "assistant", "content": text}]
        self._transcript += f"{line}{text}\n"
        report = AnswerReport.of(self._model, self._model.stats().since(before), first_token)
        print_dim(report.line())
        if self._show_details:
            print_dim(report.details())


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising it: a forward pass cut short would tear the caches."""
    caught: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Line editing with a history that outlives the program."""
    try:
        import readline
    except ImportError:  # a Python built without it still chats
        yield
        return
    from flashmoe.engine import CACHE_FOLDER

    history: Path = CACHE_FOLDER.expanduser() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(history)
