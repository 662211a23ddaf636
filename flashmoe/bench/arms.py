"""Settings of one running model that take turns, a few tokens each.

Loading a model, and filling its bank, are what a comparison of processes spends its time on; here
one model goes from setting to setting. Those with all of the bank take turns in rounds, so that a
machine, or a bank, that changes meanwhile does so for all. One with half of the bank comes last,
since what it gives up has to be read again. Knows no model, only what one can be asked to do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from flashmoe.probe.race import LEAST_PAIRS, is_faster
from flashmoe.probe.tuning import BankChoice, Choice

# A model's figures say more than those of a reader, and are noisier.
MARGIN = 0.05
ROUNDS = 6
HALF = 0.5
# Counted tokens of one turn; before them one that belongs to neither setting.
LEAST_TURN, MOST_TURN = 2, 16
SETTLING = 1
# Of the time: until the bank is full, then for all that have the whole of it, if half is to come.
FILLING_SHARE, ROUNDS_SHARE = 0.25, 0.6
# So many tokens of the last say what one takes.
LAST = 6
# Enough for the prefetch to have found out whether it pays.
LEAST_FILLING = 18
# A setting that takes so many times as long as the default is given up at once.
SLOWEST = 3.0


class Tried(Protocol):
    """A model that decodes."""

    @property
    def bank_bytes(self) -> int:
        """Of the bank with the present choice."""

    @property
    def least_bank_bytes(self) -> int: ...

    @property
    def most_bank_bytes(self) -> int: ...

    @property
    def page_cache(self) -> bool: ...

    @property
    def bytes_read(self) -> int:
        """Since it was loaded."""

    @property
    def accesses(self) -> tuple[int, int]:
        """Hits and misses since it was loaded."""

    def retune(self, choice: Choice) -> None:
        """Run on with another choice."""

    def decode(self, count: int, most_seconds: float) -> list[float]:
        """The seconds of so many more tokens, of fewer when they take longer together, but of
        one at least."""


@dataclass
class Arm:
    """A setting and its tokens per second, turn by turn."""

    name: str
    choice: Choice
    rates: list[float] = field(default_factory=list)
    bank_bytes: int = 0
    page_cache: bool = False
    hits: int = 0
    misses: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def prefetch(self) -> bool:
        return self.choice.bank is None or self.choice.bank.prefetch

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.hits + self.misses, 1)


@dataclass(frozen=True)
class Outcome:
    """`best` is the default unless another one was faster by more than the spread; `arms` are
    all that ran, the default first."""

    best: Arm
    arms: tuple[Arm, ...]
    notes: tuple[str, ...]


def try_arms(
    model: Tried,
    choice: Choice,
    seconds: float,
    *,
    uncached: bool,
    moved: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Compare `choice`, which says nothing about the bank and which `model` runs with, to other
    ways of using the same memory, within about `seconds`.

    `uncached`: whether records can be read past the page cache. `moved` is called after every
    turn. Raises what the model raises.
    """
    turns = _Turns(model, moved, clock, clock() + seconds)
    base = Arm("as by default", choice)
    kept = BankChoice(model.bank_bytes, 1.0, model.page_cache, prefetch=True)
    whole = model.bank_bytes >= model.most_bank_bytes
    others, half = ([], None) if whole else _others(choice, kept, model, uncached)
    turns.fill(model.bank_bytes, LEAST_FILLING)
    turns.run(base, others, ROUNDS_SHARE if half else 1.0)
    if not base.rates:
        turns.predict(base)
        others += [] if half is None else [half]
        half = None
    arms = [base, *(arm for arm in others if arm.rates)]
    turns.notes += [f"no time was left for: {arm.name}" for arm in others if not arm.rates]
    if whole:
        turns.notes.append("the bank holds every expert: there is nothing else to choose")
    ranked = sorted(arms, key=lambda arm: arm.median, reverse=True)
    best = next((arm for arm in ranked if _beats(arm, base)), base)
    if half is not None:
        turns.run(half, [], ROUNDS_SHARE)
        arms += [half] if half.rates else []
        turns.notes += [] if half.rates else [f"no time was left for: {half.name}"]
        if _beats(half, best):
            again = _again(turns, best, model)
            arms += [again] if again.rates else []
            best = half if _beats(half, again) else best
    return Outcome(best, tuple(arms), tuple(turns.notes))


def _others(
    choice: Choice, kept: BankChoice, model: Tried, uncached: bool
) -> tuple[list[Arm], Arm | None]:
    """What is held against the default: with the whole bank, and with half of it if that is
    enough."""
    others: list[tuple[str, BankChoice]] = []
    if uncached:
        name = "past the page cache" if kept.page_cache else "page cache"
        others.append((name, replace(kept, page_cache=not kept.page_cache)))
    others.append(("no prefetch", replace(kept, prefetch=False)))
    half = None
    if kept.bank_bytes * HALF >= model.least_bank_bytes:
        smaller = replace(kept, page_cache=True, bank_share=HALF)
        half = Arm("half the bank, page cache", replace(choice, bank=smaller))
    return [Arm(name, replace(choice, bank=bank)) for name, bank in others], half


def _again(turns: _Turns, arm: Arm, model: Tried) -> Arm:
    """What was best once more: a machine that changed meanwhile shows it by that."""
    again = Arm(f"{arm.name}, again", arm.choice)
    model.retune(arm.choice)
    turns.fill(round(model.bank_bytes * (1 - HALF)), 0)
    turns.run(again, [], 1.0)
    if not again.rates:
        turns.notes.append(f"no time was left for: {again.name}")
    return again


def _beats(arm: Arm, other: Arm) -> bool:
    count = min(len(arm.rates), len(other.rates))
    return is_faster(arm.rates[:count], other.rates[:count], MARGIN)


def _loses(arm: Arm, base: Arm) -> bool:
    """Whether an arm was slower in every pair, and by more than the margin."""
    ratios = [a / b for a, b in zip(arm.rates, base.rates, strict=False)]
    if len(ratios) < LEAST_PAIRS:
        return False
    return max(ratios) < 1 and statistics.median(ratios) < 1 - MARGIN


class _Turns:
    """Has a model decode with one setting after the other until `ends`."""

    def __init__(
        self, model: Tried, moved: Callable[[], None], clock: Callable[[], float], ends: float
    ) -> None:
        self.notes: list[str] = []
        self._model = model
        self._moved = moved
        self._clock = clock
        self._ends = ends
        # What a token took last.
        self._token_seconds = 0.0

    def fill(self, bank_bytes: int, least: int) -> None:
        """Decode until so many bytes were read and so many tokens decoded, as far as the time
        for it goes."""
        ends = self._clock() + FILLING_SHARE * (self._ends - self._clock())
        before = self._model.bytes_read
        taken: list[float] = []
        while not taken or self._clock() < ends:
            if len(taken) >= least and self._model.bytes_read - before >= bank_bytes:
                break
            # A token that hits everywhere reads nothing: the bank is as full as it gets.
            read = self._model.bytes_read
            taken += self._model.decode(LEAST_TURN, max(ends - self._clock(), 0.0))
            self._moved()
            if len(taken) >= least and self._model.bytes_read == read:
                break
        self._token_seconds = statistics.median(taken[-LAST:])

    def run(self, base: Arm, others: Sequence[Arm], share: float) -> None:
        """Rounds of `base` and others, for a share of the time that is left.

        Others leave that lose. A round that the time does not suffice for does not begin.
        """
        ends = self._clock() + share * (self._ends - self._clock())
        left = list(others)
        for number in range(ROUNDS):
            arms = [base, *left]
            seconds = (ends - self._clock()) / len(arms)
            tokens = int(seconds / (ROUNDS - number) / self._token_seconds) - SETTLING
            tokens = min(max(tokens, LEAST_TURN), MOST_TURN)
            # The tokens that filled the bank took longer than those of a first round will.
            most = seconds if base.rates else (self._ends - self._clock()) / len(arms)
            if most < (tokens + SETTLING) * self._token_seconds:
                return
            rates = {
                arm.name: self._turn(arm, tokens) for arm in (arms[::-1] if number % 2 else arms)
            }
            for arm in arms:
                arm.rates.append(rates[arm.name])
            slow = [arm for arm in arms if arm.rates[-1] * self._token_seconds < 1 / SLOWEST]
            left = [arm for arm in left if arm not in slow and not _loses(arm, base)]
            if base in slow:
                return
            self._token_seconds = 1 / base.rates[-1]

    def predict(self, arm: Arm) -> None:
        """Take the tokens that filled the bank for its rate, there being no time for others."""
        arm.rates.append(1 / self._token_seconds)
        arm.hits, arm.misses = self._model.accesses
        arm.bank_bytes, arm.page_cache = self._model.bank_bytes, self._model.page_cache
        self.notes.append(f"{arm.name}: there was no time for more than its first tokens")

    def _turn(self, arm: Arm, tokens: int) -> float:
        """Tokens per second of one turn."""
        model = self._model
        model.retune(arm.choice)
        limit = SLOWEST * tokens * self._token_seconds
        model.decode(SETTLING, limit)
        before = model.accesses
        taken = model.decode(tokens, limit)
        hits, misses = model.accesses
        arm.hits += hits - before[0]
        arm.misses += misses - before[1]
        arm.bank_bytes, arm.page_cache = model.bank_bytes, model.page_cache
        self._moved()
        return len(taken) / sum(taken)
