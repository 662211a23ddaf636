"""The figures of an answer: tokens, seconds by phase, hits, misses and bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from flashmoe.bank.meter import COUNTS, Counters, Meter
from flashmoe.base.clock import Phases


@dataclass
class Seconds:
    """Wall-clock seconds of generation.

    `prefill` and `decode` are what they took from begin to end; `in_prefill` and `in_decode`
    say by phase where that went.
    """

    prefill: float = 0.0
    decode: float = 0.0
    in_prefill: Phases = field(default_factory=Phases)
    in_decode: Phases = field(default_factory=Phases)

    @property
    def phases(self) -> Phases:
        """Prefill and decode together."""
        return self.in_prefill + self.in_decode

    def add(self, part: Part, seconds: float, phases: Phases) -> None:
        """Count the time of one stretch of prefill or decode."""
        setattr(self, part, getattr(self, part) + seconds)
        into = self.in_prefill if part == "prefill" else self.in_decode
        into += phases


@dataclass
class Report(Counters):
    """What one answer took; `FlashMoEModel.totals` gives the sum over all answers.

    `prompt_tokens` counts the tokens of the prompt (that were fed, where it was interrupted),
    `cached_tokens` those of them that were in the KV cache already, `generated_tokens` those of
    the answer, its end included.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    seconds: Seconds = field(default_factory=Seconds)

    def since(self, earlier: Report) -> Report:
        """What these totals have more than earlier ones."""
        names = (*COUNTS, *_TOKENS)
        more = {name: getattr(self, name) - getattr(earlier, name) for name in names}
        now, then = self.seconds, earlier.seconds
        return Report(
            **more,
            seconds=Seconds(
                now.prefill - then.prefill,
                now.decode - then.decode,
                now.in_prefill - then.in_prefill,
                now.in_decode - then.in_decode,
            ),
        )

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the first token comes out of the prompt. 0 when there was no other."""
        later, seconds = self.generated_tokens - 1, self.seconds.decode
        return later / seconds if later > 0 and seconds > 0 else 0.0

    @property
    def fed_tokens(self) -> int:
        """Prompt tokens that went through the model."""
        return self.prompt_tokens - self.cached_tokens


Part = Literal["prefill", "decode"]


class Ledger:
    """Figures of one model's answers, and the sum of them."""

    def __init__(self, meter: Meter | None = None) -> None:
        self.meter = meter or Meter()
        self._totals = Report()
        # What runs outside of an answer goes here.
        self.meter.clock.totals = self._totals.seconds.in_decode

    def totals(self) -> Report:
        """The sum over all answers so far, and over calls of the model outside of any."""
        nothing = Report()
        return self._totals.since(nothing).add(nothing.counts(), self.meter.counters.counts())

    def count_prompt(self, report: Report, prompt_tokens: int, cached_tokens: int) -> None:
        """Note a prompt that is in the KV cache now, and how much of it was before."""
        for figures in (report, self._totals):
            figures.prompt_tokens += prompt_tokens
            figures.cached_tokens += cached_tokens

    def count_token(self, report: Report) -> None:
        """Note a generated token."""
        for figures in (report, self._totals):
            figures.generated_tokens += 1

    @contextmanager
    def measuring(self, report: Report, part: Part) -> Iterator[None]:
        """Count and time the block as part of an answer; what no phase of its own claims is the
        host's."""
        counters, clock = self.meter.counters, self.meter.clock
        idle, clock.totals = clock.totals, Phases()
        before, started = counters.counts(), time.perf_counter()
        try:
            with clock.during("host"):
                yield
        finally:
            seconds = time.perf_counter() - started
            for figures in (report, self._totals):
                figures.seconds.add(part, seconds, clock.totals)
            report.add(before, counters.counts())
            clock.totals = idle


_TOKENS = ("prompt_tokens", "cached_tokens", "generated_tokens")
