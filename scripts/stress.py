"""Hunt for races: models under random settings, in several threads, their reads failing.

    python scripts/stress.py [--minutes 10] [--threads 3] [--seed 0]

Every example draws a setting of the engine (tests/support/exact_settings.py: family, bank, staging,
prefetch, chunk, reader, page cache, speed and disorder of the disk), and how often its
reads fail and its waits are interrupted. What it says until then has to be byte-equal to the plain
path, and so has what the same model says when it is asked again, until nothing fails. Banks are
checked after every token.

An example is drawn from its number: `--seed N --examples 1 --threads 1` runs number N again.
Ends with exit code 1 and that number when logits differ, a bank contradicts itself, another
error than the injected ones is raised, or nothing has moved for a minute.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import os
import queue
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from flashmoe.base.errors import ReadError
from tests.support.exact_settings import CHOICES, Setting, Trials, logits

PATIENCE_SECONDS = 60.0
REPORT_SECONDS = 10.0
FAULT_CHANCES = (0.0, 0.0, 0.002, 0.02)
INTERRUPT_CHANCES = (0.0, 0.0, 0.002, 0.02)
# How often an example is asked again before its reader is mended.
MOST_FAILURES = 10


@dataclass(frozen=True)
class Example:
    """One model and how it is to fail."""

    number: int
    setting: Setting
    fault_chance: float
    interrupt_chance: float

    @classmethod
    def of(cls, number: int) -> Example:
        draw = random.Random(number)
        setting = Setting(**{name: draw.choice(values) for name, values in CHOICES.items()})
        return cls(number, setting, draw.choice(FAULT_CHANCES), draw.choice(INTERRUPT_CHANCES))


@dataclass(frozen=True)
class Outcome:
    """What an example said, each time that it was asked; the last time nothing failed."""

    example: Example
    answers: list[list[bytes]]
    failures: Counter[str]
    error: str | None = None


def run(trials: Trials, example: Example) -> Outcome:
    """Ask until nothing fails."""
    answers: list[list[bytes]] = []
    failures: Counter[str] = Counter()
    faults = {"fault_chance": example.fault_chance, "interrupt_chance": example.interrupt_chance}
    try:
        with trials.model(example.setting, **faults) as model:
            while True:
                answers.append([])
                try:
                    for row in logits(model, example.setting, trials.building):
                        answers[-1].append(row)
                    return Outcome(example, answers, failures)
                except (ReadError, KeyboardInterrupt) as error:
                    failures[type(error).__name__] += 1
                    model.check_integrity()
                    if failures.total() == MOST_FAILURES:
                        trials.mend(model)
    except BaseException:
        return Outcome(example, answers, failures, traceback.format_exc())


def work(
    trials: Trials,
    numbers: queue.Queue[int | None],
    outcomes: queue.Queue[Outcome | None],
) -> None:
    while (number := numbers.get()) is not None:
        outcomes.put(run(trials, Example.of(number)))
    outcomes.put(None)


def complaint(trials: Trials, outcome: Outcome) -> str | None:
    """What is wrong with an outcome."""
    if outcome.error is not None:
        return outcome.error
    expected = trials.expected(outcome.example.setting)
    for answer in outcome.answers:
        if answer != expected[: len(answer)]:
            step = next(i for i, row in enumerate(answer) if row != expected[i])
            return f"logits differ from the plain path's after step {step} of {len(expected)}"
    if len(outcome.answers[-1]) != len(expected):
        return "the last answer is not whole"
    return None


def stress(args: argparse.Namespace, trials: Trials) -> int:
    """Run until the time or the examples are over; returns the exit code."""
    for family in CHOICES["family"]:
        trials.store(family)
    numbers: queue.Queue[int | None] = queue.Queue(maxsize=args.threads)
    outcomes: queue.Queue[Outcome | None] = queue.Queue()
    for _ in range(args.threads):
        threading.Thread(target=work, args=(trials, numbers, outcomes), daemon=True).start()
    started = reported = time.monotonic()
    failures: Counter[str] = Counter()
    upcoming = itertools.count(args.seed)
    done, running = 0, args.threads
    for _ in range(args.threads):
        numbers.put(next(upcoming))
    while running:
        # From a thread of its own, which needs no lock of Python's.
        faulthandler.dump_traceback_later(PATIENCE_SECONDS, exit=True)
        outcome = outcomes.get()
        if outcome is None:
            running -= 1
            continue
        done += 1
        failures += outcome.failures
        wrong = complaint(trials, outcome)
        if wrong is not None:
            print(f"number {outcome.example.number}: {outcome.example}\n{wrong}", flush=True)
            return 1
        elapsed = time.monotonic() - started
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            print(progress(elapsed, done, failures), flush=True)
        begun = done + running
        over = elapsed > 60 * args.minutes or (args.examples and begun > args.examples)
        numbers.put(None if over else next(upcoming))
    print(progress(time.monotonic() - started, done, failures))
    print(", ".join(f"{way} {count:,}" for way, count in sorted(trials.hits.items())))
    return 0


def progress(seconds: float, done: int, failures: Counter[str]) -> str:
    return (
        f"{seconds:.0f} s: {done} examples, {done / seconds:.1f} per second, byte-equal; "
        f"{failures['ReadError']} read faults, {failures['KeyboardInterrupt']} interrupts"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="default: 10")
    parser.add_argument("--threads", type=int, default=3, help="models at once; default: 3")
    parser.add_argument("--seed", type=int, default=0, help="number of the first example")
    parser.add_argument("--examples", type=int, default=0, help="most of them; 0: no limit")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stress-") as folder, Trials(Path(folder)) as trials:
        code = stress(args, trials)
    # Other threads may be running still.
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
