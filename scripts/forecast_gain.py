"""What reading ahead gains, and what it costs where it is no use, at disks of chosen speed.

    python scripts/forecast_gain.py STORE [--cache 2500MB] [--tokens 25] [--rounds 5]

First: how long a token takes with every expert in memory, and how many bytes it misses in a bank of
`--cache`. From these follow the speeds of emulated disks (tests/support/delaying.py) that need
twice as long for reading a token's records as computing takes, or just as long, or a tenth. At
each, the same prompts are answered with and without reading ahead, in turns in one
process, after one round of warm-up. Then the same where guesses can only cost: with every expert in memory, and with
guesses that are the least likely experts instead of the likeliest.

`gain` is the median over rounds of speed with reading ahead over speed without, less one; `read`
is bytes read per byte that is missed without reading ahead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from flashmoe import FlashMoEModel
from flashmoe.bank.stats import Stats
from flashmoe.base.units import format_size
from flashmoe.engine import api
from flashmoe.io.reader import Reader
from flashmoe.store.reader import open_store
from tests.support.delaying import DelayingReader

TARGETS = {"gain": 0.10, "cost": 0.02, "read without": 1.02, "read with": 1.25}
# Reading over computing, without reading ahead.
SPEEDS = {"disk half as fast": 2.0, "disk as fast": 1.0, "disk ten times as fast": 0.1}


@dataclass
class Subject:
    """One model, and what its rounds took."""

    model: FlashMoEModel
    rates: list[float] = field(default_factory=list)
    spent: list[Stats] = field(default_factory=list)

    def answer(self, prompt: list[int], tokens: int) -> None:
        """Decode after a prompt, which is not counted."""
        pieces = self.model.stream(prompt, tokens)
        next(pieces)
        before = self.model.stats()
        for _ in pieces:
            pass
        spent = self.model.stats().since(before)
        self.spent.append(spent)
        self.rates.append(spent.tokens / spent.seconds.decode)

    def total(self, name: str) -> Any:
        return sum(getattr(spent, name) for spent in self.spent)

    def share_of_waiting(self) -> float:
        phases = [spent.seconds.in_decode for spent in self.spent]
        return sum(p.reading for p in phases) / sum(p.total for p in phases)


@dataclass(frozen=True)
class Result:
    """One setting; speeds in tokens per second, lowest, median and highest."""

    name: str
    bytes_per_second: float | None
    without: tuple[float, float, float]
    with_: tuple[float, float, float]
    gain: float
    lowest_gain: float
    highest_gain: float
    waiting_without: float
    waiting_with: float
    read_without: float | None
    read_with: float | None
    precision: float | None
    recall: float | None


def open_model(
    store: Path, cache: str, forecast: bool, bytes_per_second: float | None
) -> FlashMoEModel:
    """A model behind an emulated disk, or behind this machine's."""
    open_reader = api.open_reader

    def open_slow(*args: Any, **kwargs: Any) -> Reader:
        reader = open_reader(*args, **kwargs)
        if bytes_per_second is None:
            return reader
        return DelayingReader(reader, bytes_per_second=bytes_per_second)

    with mock.patch.object(api, "open_reader", open_slow):
        return FlashMoEModel(open_store(store), cache=cache, forecast=forecast)


def prompts(model: FlashMoEModel, rounds: int, length: int = 12) -> list[list[int]]:
    """Random ones, as many as there are rounds and one for the warm-up."""
    draw = np.random.default_rng(0)
    size = len(model.tokenizer)
    return [draw.integers(0, size, length).tolist() for _ in range(rounds + 1)]


@contextmanager
def least_likely() -> Iterator[None]:
    """Guesses are the experts that a router gives the lowest scores."""
    find = api.find_forecasters

    def found(*args: Any) -> Any:
        return [g and (lambda x, g=g: g(x, g.n_experts)[-g.top_k :][::-1]) for g in find(*args)]

    with mock.patch.object(api, "find_forecasters", found):
        yield


def compare(name: str, args: argparse.Namespace, cache: str, speed: float | None) -> Result:
    """Rounds with and without reading ahead, in turns."""
    with ExitStack() as stack:
        off, on = (
            Subject(stack.enter_context(open_model(args.store, cache, forecast, speed)))
            for forecast in (False, True)
        )
        for number, prompt in enumerate(prompts(off.model, args.rounds)):
            order = (off, on) if number % 2 else (on, off)
            for subject in order:
                subject.answer(prompt, args.tokens)
            if number == 0:
                for subject in order:
                    subject.rates.clear()
                    subject.spent.clear()
    record = open_store(args.store).manifest.layers[0].layout.record.stride
    missed = off.total("misses") * record
    gains = [b / a - 1 for a, b in zip(off.rates, on.rates, strict=True)]
    guessed = on.total("guessed")
    needed = on.total("guessed_right") + on.total("unguessed")
    return Result(
        name=name,
        bytes_per_second=speed,
        without=(min(off.rates), median(off.rates), max(off.rates)),
        with_=(min(on.rates), median(on.rates), max(on.rates)),
        gain=median(gains),
        lowest_gain=min(gains),
        highest_gain=max(gains),
        waiting_without=off.share_of_waiting(),
        waiting_with=on.share_of_waiting(),
        read_without=off.total("bytes_read") / missed if missed else None,
        read_with=on.total("bytes_read") / missed if missed else None,
        precision=on.total("guessed_right") / guessed if guessed else None,
        recall=on.total("guessed_right") / needed if needed else None,
    )


def measure_token(args: argparse.Namespace) -> tuple[float, float]:
    """Seconds that a token computes with every expert in memory, and bytes that it misses."""
    with open_model(args.store, args.all_bytes, False, None) as model:
        subject = Subject(model)
        prompt = prompts(model, 1)[0]
        # The experts of these tokens are in memory after the first time.
        for _ in range(4):
            subject.answer(prompt, args.tokens)
        seconds = 1 / median(subject.rates[1:])
    with open_model(args.store, args.cache, False, None) as model:
        subject = Subject(model)
        for prompt in prompts(model, 1):
            subject.answer(prompt, args.tokens)
        missed = subject.spent[-1].bytes_read / subject.spent[-1].tokens
    return seconds, missed


def print_result(result: Result) -> None:
    def speeds(of: tuple[float, float, float]) -> str:
        return f"{of[1]:.2f} ({of[0]:.2f} to {of[2]:.2f}) tok/s"

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    disk = "" if result.bytes_per_second is None else f", {result.bytes_per_second / 1e6:.0f} MB/s"
    print(
        f"{result.name}{disk}\n"
        f"  without {speeds(result.without)}, waiting {result.waiting_without:.0%}, "
        f"read {number(result.read_without)}\n"
        f"  with    {speeds(result.with_)}, waiting {result.waiting_with:.0%}, "
        f"read {number(result.read_with)}, precision {number(result.precision)}, "
        f"recall {number(result.recall)}\n"
        f"  gain {result.gain:+.1%} ({result.lowest_gain:+.1%} to {result.highest_gain:+.1%})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("store", type=Path, help="a store with records of 256 KiB or more")
    parser.add_argument("--cache", default="2500MB", help="the bank's memory; default: 2500MB")
    parser.add_argument("--tokens", type=int, default=25, help="of each answer; default: 25")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--only", action="append", help="settings whose name begins like this")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args()
    args.all_bytes = str(2 * open_store(args.store).manifest.streamed_bytes)
    seconds, missed = measure_token(args)
    if not args.json:
        print(f"a token computes for {1000 * seconds:.1f} ms and misses {format_size(missed)}")
    results = []

    def wanted(name: str) -> bool:
        return args.only is None or any(name.startswith(begin) for begin in args.only)

    def add(name: str, cache: str, speed: float | None) -> None:
        results.append(compare(name, args, cache, speed))
        if not args.json:
            print_result(results[-1])

    for name, times in SPEEDS.items():
        if wanted(name):
            add(name, args.cache, missed / (times * seconds))
    if wanted("every expert in memory"):
        add("every expert in memory", args.all_bytes, None)
    with least_likely():
        for name, times in SPEEDS.items():
            if wanted(f"wrong guesses, {name}"):
                add(f"wrong guesses, {name}", args.cache, missed / (times * seconds))
    if args.json:
        report = {"token_seconds": seconds, "missed_bytes": missed, "targets": TARGETS}
        print(json.dumps(report | {"results": [asdict(result) for result in results]}))


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    main()
