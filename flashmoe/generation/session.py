"""A conversation: text pieces out, caches kept between turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.sample_utils import make_sampler

from flashmoe.base.errors import OptionError, PromptError
from flashmoe.base.progress import Progress
from flashmoe.generation.decode_loop import generate_tokens
from flashmoe.generation.prompt import Prompt, encode_prompt
from flashmoe.generation.report import Ledger, Report
from flashmoe.generation.token_state import BeforeStep, TokenState
from flashmoe.generation.turns import GivenUp, Turn, Turns

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest.

    `top_p`, `top_k` and `min_p` restrict the choice (1, 0 and 0 do not); `seed` makes it
    repeatable.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise OptionError(f"temperature must be a number from 0 up, but is {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise OptionError(f"top-p must be above 0 and at most 1, but is {self.top_p}")
        if self.top_k < 0:
            raise OptionError(f"top-k must not be negative, but is {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise OptionError(f"min-p must be from 0 to 1, but is {self.min_p}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise OptionError(f"seed must be from 0 to 2^64 - 1, but is {self.seed}")

    def sampler(self, vocabulary: int) -> Callable[[mx.array], mx.array]:
        """mlx-lm's sampler over log-probabilities [1, vocabulary]."""
        top_k = self.top_k if self.top_k < vocabulary else 0
        sampler: Callable[[mx.array], mx.array] = make_sampler(
            self.temperature, self.top_p, self.min_p, top_k=top_k
        )
        return sampler


@dataclass(frozen=True)
class Piece:
    """One generated token and the text that became printable with it.

    `finish_reason` is None until the last piece: "stop" (end of turn), "length" (max_tokens or
    the context is full) or "interrupt". The last piece may carry no new token (`token` None).
    `report` has the answer's figures so far, and all of them with the last piece.
    """

    text: str
    token: int | None = None
    finish_reason: str | None = None
    report: Report = field(default_factory=Report, compare=False)


@dataclass(frozen=True)
class Answer:
    """A whole answer: its text, token ids, why it ended (as in `Piece`) and its figures."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    report: Report

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> Answer:
        """What the pieces of a stream come to."""
        parts = list(pieces)
        last = parts[-1]
        assert last.finish_reason is not None
        tokens = tuple(piece.token for piece in parts if piece.token is not None)
        return cls("".join(p.text for p in parts), tokens, last.finish_reason, last.report)


def check_max_tokens(max_new_tokens: int) -> None:
    """Raise OptionError unless at least one token may be generated."""
    if max_new_tokens < 1:
        raise OptionError(f"the number of new tokens must be at least 1, not {max_new_tokens}")


class Session:
    """Generates with one model, feeding only what earlier turns have not already fed."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        ledger: Ledger,
        *,
        context: int,
        chunk: int,
        before_step: BeforeStep | None = None,
        turns: Turns | None = None,
    ) -> None:
        """`turns` is the queue of the model's answers; a session without one is alone with it."""
        self._tokenizer = tokenizer
        self._ledger = ledger
        self._context = context
        self._turns = turns or Turns()
        self._state = TokenState(model, ledger.meter.clock, chunk, before_step)

    def mark(self) -> list[int]:
        """Keep what it takes to feed other tokens behind those that were fed so far, and these
        again, whatever the caches are; returns the ids that were fed."""
        self._state.mark()
        return list(self._state.ids)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling | None = None,
        system: str | None = None,
        template: bool = True,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Piece]:
        """Answer a prompt (text, ids or messages) piece by piece.

        The answer begins with the first piece that is asked for: it then waits for its turn, and
        has it until the last piece, or until the iterator is closed or dropped.
        `progress(done, total)` counts prompt tokens; `should_stop` is asked while waiting, between
        tokens and between the layers of a prompt. Raises PromptError when the prompt does not fit
        the context, and FlashMoEError once the model is closed.
        """
        self._turns.check_open()
        check_max_tokens(max_new_tokens)
        ids = encode_prompt(self._tokenizer, prompt, system=system, template=template)
        if len(ids) > self._context:
            raise PromptError(
                f"the prompt has {len(ids)} tokens but the context holds {self._context}; "
                "shorten it or ask for a larger --context"
            )
        return self._pieces(ids, max_new_tokens, sampling or Sampling(), progress, should_stop)

    def _pieces(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        progress: Progress | None,
        should_stop: Callable[[], bool],
    ) -> Iterator[Piece]:
        report = Report()
        try:
            turn = self._turns.take(should_stop)
        except GivenUp:
            yield Piece("", None, "interrupt", report)
            return
        with turn:
            yield from self._answer(
                turn, report, ids, max_new_tokens, sampling, progress, should_stop
            )

    def _answer(
        self,
        turn: Turn,
        report: Report,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        progress: Progress | None,
        should_stop: Callable[[], bool],
    ) -> Iterator[Piece]:
        if sampling.seed is not None:
            mx.random.seed(sampling.seed)
        stop_ids = set(self._tokenizer.eos_token_ids)
        detokenizer = self._tokenizer.detokenizer
        # The last token is sampled but never fed, so it needs no place in the context.
        budget = min(max_new_tokens, self._context - len(ids) + 1)
        count = 0
        reason = "interrupt"
        for token in generate_tokens(
            self._state,
            ids,
            sampler=sampling.sampler(len(self._tokenizer)),
            max_tokens=budget,
            stop_ids=stop_ids,
            ledger=self._ledger,
            report=report,
            turn=turn,
            progress=progress,
            should_stop=should_stop,
        ):
            count += 1
            if token in stop_ids:
                reason = "stop"
                break
            detokenizer.add_token(token)
            yield Piece(detokenizer.last_segment, token, None, report)
        if reason != "stop" and count == budget:
            reason = "length"
        detokenizer.finalize()
        yield Piece(detokenizer.last_segment, None, reason, report)
