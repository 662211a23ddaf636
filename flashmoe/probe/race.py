"""Which of several settings is fastest, in a given time: rounds in which the slower half leaves.

What is still in the race is measured once per round, in random order, so that a machine that
speeds up or slows down does so for all. The last one left is then held against the default in
pairs of its own: what was picked for being fastest is flattered by the figures it was picked by.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

FINAL_PAIRS = 5
LEAST_PAIRS = 3
# The share of the time after which the final begins, whoever is left.
FINAL_FROM = 0.6
# What is less than this faster is not worth leaving the default for.
MARGIN = 0.03


@dataclass
class Runner(Generic[T]):
    """A setting and the rates that its measurements gave, those of the final apart."""

    setting: T
    rates: list[float] = field(default_factory=list)
    final: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.final or self.rates)


@dataclass(frozen=True)
class RaceOutcome(Generic[T]):
    """`winner` is the default unless another one was faster by more than the spread.

    `runners` are all that were measured, the default first, the others fastest first.
    """

    winner: Runner[T]
    runners: tuple[Runner[T], ...]

    @property
    def default(self) -> Runner[T]:
        return self.runners[0]


def is_faster(rates: Sequence[float], than: Sequence[float]) -> bool:
    """Whether rates beat others, measured in pairs, in every pair, and by more than MARGIN
    and their spread: half the distance between the extremes of the pairs' ratios."""
    ratios = [a / b for a, b in zip(rates, than, strict=True)]
    if len(ratios) < LEAST_PAIRS:
        return False
    spread = (max(ratios) - min(ratios)) / 2
    return min(ratios) > 1 and statistics.median(ratios) - 1 > max(MARGIN, spread)


def affordable(count: int) -> int:
    """How many settings can race, the default among them, in so many measurements."""
    # Rounds of halves take twice as many as there are settings, the final its pairs.
    return max(0, (count - 2 * FINAL_PAIRS) // 2)


def measurements(settings: int) -> int:
    """About how many measurements a race of so many settings takes."""
    return 2 * settings + 2 * FINAL_PAIRS


def race(
    settings: Sequence[T],
    measure: Callable[[T], float],
    used: Callable[[], float],
    draw: random.Random,
) -> RaceOutcome[T]:
    """Find the fastest of `settings`, the first of which is the default.

    `measure` gives a rate. `used`, asked before each measurement but the first, is the share of
    the time that is over: at FINAL_FROM the fastest so far goes to the final, at 1 that ends.
    """
    default, *others = (Runner(setting) for setting in settings)
    default.rates.append(measure(default.setting))
    left = others
    while len(left) > 1 and used() < FINAL_FROM:
        for runner in draw.sample(left, len(left)):
            if used() >= FINAL_FROM:
                break
            runner.rates.append(measure(runner.setting))
        left = _ranked(left)[: -(-len(left) // 2)]
    winner = default
    if left:
        _final(default, left[0], measure, used)
        if is_faster(left[0].final, default.final):
            winner = left[0]
    return RaceOutcome(winner, (default, *_ranked(others)))


def _ranked(runners: Sequence[Runner[T]]) -> list[Runner[T]]:
    """Those that were measured, fastest first."""
    measured = [runner for runner in runners if runner.rates or runner.final]
    return sorted(measured, key=lambda runner: runner.median, reverse=True)


def _final(
    default: Runner[T],
    other: Runner[T],
    measure: Callable[[T], float],
    used: Callable[[], float],
) -> None:
    for number in range(FINAL_PAIRS):
        pair = []
        # Whoever comes second gains from nothing.
        for runner in (default, other) if number % 2 else (other, default):
            if used() >= 1:
                return
            pair.append((runner, measure(runner.setting)))
        for runner, rate in pair:
            runner.final.append(rate)
