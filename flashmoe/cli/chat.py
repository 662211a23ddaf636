"""`flashmoe chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.base.errors import FlashMoEError
from flashmoe.cli import options

if TYPE_CHECKING:
    from flashmoe.engine.api import FlashMoEModel
    from flashmoe.generation.session import Sampling

HISTORY_LINES = 1000

HELP = """\
/help   this list
/reset  forget the conversation
/stats  totals since the start
/exit   leave (or Ctrl-D)
Ctrl-C stops an answer."""


@options.with_engine_options
def chat(
    model: options.Model = None,
    *,
    engine: options.EngineOptions,
    max_tokens: options.MaxTokens = 1024,
    temp: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    system: options.System = None,
    no_template: options.NoTemplate = False,
    stats: options.ShowStats = False,
) -> None:
    """Chat with a model; type /help inside for commands.

    Example: flashmoe chat Qwen/Qwen3-30B-A3B --memory 12GB
    """
    from rich.markup import escape

    from flashmoe.base.units import format_size
    from flashmoe.cli.console import out, print_dim
    from flashmoe.generation.session import Sampling, check_max_tokens

    check_max_tokens(max_tokens)
    sampling = Sampling(temp, top_p, top_k, min_p, seed)
    loaded = options.load(model, engine)
    with loaded:
        manifest = loaded.store.manifest
        slots = sum(loaded.memory_plan.slots)
        experts = sum(layer.layout.n_experts for layer in manifest.layers)
        out.print(f"[bold]{escape(manifest.source.repo)}[/bold] ({escape(manifest.model_type)})")
        print_dim(
            f"{format_size(manifest.streamed_bytes)} of experts on disk, {slots} of {experts} "
            f"fit the bank of {format_size(loaded.bank_bytes)}; /help for commands"
        )
        if loaded.lossy:
            print_dim(f"lossy: {', '.join(loaded.lossy)}; answers are not the model's own")
        talk = _Conversation(loaded, sampling, system, not no_template, max_tokens, stats)
        with _line_editing() as save_history:
            while talk.turn():
                save_history()


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
        try:
            line = input("> ").strip()
            if line == "/exit":
                return False
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)
        except EOFError:
            print()
            return False
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)")
        except FlashMoEError as error:
            _complain(str(error))
        return True

    def _command(self, line: str) -> None:
        from flashmoe.base.units import format_size
        from flashmoe.cli.console import print_dim, report_lines

        if line == "/help":
            print(HELP)
        elif line == "/reset":
            self.reset()
            print_dim("conversation forgotten")
        elif line == "/stats":
            totals = self._model.totals()
            print_dim(
                f"{totals.fed_tokens} prompt tokens · {totals.generated_tokens} generated · "
                f"{totals.hits} hits · {totals.misses} misses · hit rate {totals.hit_rate:.0%} · "
                f"{format_size(totals.bytes_read)} read of "
                f"{format_size(totals.bytes_demanded)} demanded"
            )
            for line in report_lines(totals):
                print_dim(line)
        else:
            print(f"{line} is no command\n{HELP}")

    def _answer(self, line: str) -> None:
        from flashmoe.cli.console import AnswerSummary, late_progress, print_dim

        question = {"role": "user", "content": line}
        prompt: Any = [*self._messages, question] if self._template else self._transcript + line
        started = time.perf_counter()
        first_token = 0.0
        text = ""
        with _stop_on_interrupt() as stopped, late_progress("reading prompt") as progress:
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
        # A seed starts the conversation; reseeding would draw the same numbers every turn.
        self._sampling = replace(self._sampling, seed=None)
        print(" (stopped)" if stopped else "")
        self._messages += [question, {"role": "assistant", "content": text}]
        self._transcript += f"{line}{text}\n"
        summary = AnswerSummary.of(self._model, piece.report, first_token)
        print_dim(summary.line())
        if self._show_details:
            for line in summary.details():
                print_dim(line)


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising it: a forward pass cut short would tear the caches."""
    caught: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, previous)


def _complain(message: str) -> None:
    from flashmoe.cli.console import err

    err.print(f"flashmoe: {message}", markup=False)


@contextlib.contextmanager
def _line_editing() -> Iterator[Callable[[], None]]:
    """Line editing with a history that outlives the program; yields what saves it."""
    try:
        import readline
    except ImportError:  # a Python built without it still chats
        yield lambda: None
        return
    from flashmoe.engine.model_cache import CACHE_FOLDER

    history: Path = CACHE_FOLDER.expanduser() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(HISTORY_LINES)

    def save() -> None:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)

    try:
        yield save
    finally:
        save()
