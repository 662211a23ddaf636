"""Where the time of a token goes: every phase gets what was spent in it, and none is forgotten."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from flashmoe import FlashMoEModel, native
from flashmoe.base.clock import PhaseClock, Phases
from flashmoe.engine import build
from flashmoe.generation.report import Ledger, Report
from flashmoe.io.native import NativeReader
from flashmoe.io.reader import Reader
from flashmoe.io.threads import ThreadReader
from flashmoe.kernels import linear
from flashmoe.store.reader import Store
from tests.support.answers import BARN
from tests.support.wide import wide_store

NATIVE = native.available() is None


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return wide_store(tmp_path_factory.mktemp("wide"), "qwen3_moe")


def test_a_clock_is_in_one_phase() -> None:
    now = 0.0
    clock = PhaseClock(lambda: now)
    now = 1.0
    with clock.during("host"):
        now += 2
        with clock.during("reading"):
            now += 30
            with pytest.raises(KeyError), clock.during("experts"):
                now += 400
                raise KeyError
            now += 5000
        now += 60_000
    now = 1e9
    assert clock.totals == Phases(computing=0, reading=5030, experts=400, host=60_002)
    assert clock.totals.total == 65_432


def test_arithmetic() -> None:
    a, b = Phases(1, 2, 3, 4), Phases(10, 20, 30, 40)
    assert asdict(a + b) == {"computing": 11, "reading": 22, "experts": 33, "host": 44}
    assert b - a == Phases(9, 18, 27, 36)


def test_a_part_that_fails_is_counted_too() -> None:
    ledger, report = Ledger(), Report()
    with pytest.raises(KeyboardInterrupt), ledger.measuring(report, "prefill"):
        time.sleep(0.02)
        raise KeyboardInterrupt
    assert report.seconds.prefill >= report.seconds.in_prefill.host >= 0.02
    assert ledger.totals().seconds == report.seconds
    # Outside of an answer.
    with ledger.meter.clock.during("reading"):
        time.sleep(0.02)
    before = ledger.totals()
    assert before.seconds.in_decode.reading == before.seconds.phases.reading >= 0.02
    with ledger.meter.clock.during("reading"):
        time.sleep(0.02)
    after = ledger.totals()
    assert after.since(before).seconds.in_decode.reading >= 0.02
    assert before.seconds.in_decode.reading < after.seconds.in_decode.reading
    assert report.seconds.in_decode == Phases()


def explained(model: FlashMoEModel, prompt: Any, tokens: int) -> list[float]:
    """Per decoded token, the sum of its phases over the time that its caller waited for it."""
    shares = []
    pieces = model.stream(prompt, tokens, temperature=5.0, seed=2)
    next(pieces)
    for _ in range(tokens - 2):
        before, started = model.totals(), time.perf_counter()
        next(pieces)
        wall = time.perf_counter() - started
        shares.append(model.totals().since(before).seconds.in_decode.total / wall)
    return shares


@pytest.mark.parametrize("cache", ["min", "half", "full"])
def test_phases_explain_a_token_of_the_demo(demo_store: Path, cache: str) -> None:
    size = {"min": "min", "half": "10MB", "full": "1GB"}[cache]
    with FlashMoEModel.from_pretrained(demo_store, cache=size) as model:
        shares = explained(model, BARN, 60)
        seconds = model.totals().seconds
    assert 0.95 <= statistics.median(shares) <= 1
    # And each phase is in there.
    assert min(seconds.in_decode.computing, seconds.in_decode.host) > 0
    assert min(seconds.in_decode.experts, seconds.in_decode.reading) > 0
    assert seconds.in_prefill.total == pytest.approx(seconds.prefill, rel=0.05)
    assert seconds.in_decode.total == pytest.approx(seconds.decode, rel=0.05)


@pytest.mark.parametrize("kernel", ["reference", *(["cpu"] if NATIVE else [])])
def test_phases_explain_a_token_with_overlap(wide: Store, kernel: str) -> None:
    with FlashMoEModel(wide, cache="min", kernel=kernel) as model:
        shares = explained(model, list(range(20)), 60)
    assert 0.95 <= statistics.median(shares) <= 1


class Naps:
    """A clock that goes on only while what was slowed down is called."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.now = 0.0

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.now += 1
            return function(*args, **kwargs)

        return call


def slow_reading(naps: Naps) -> None:
    opened: type[Any] = NativeReader if NATIVE else ThreadReader

    def open_slow(name: Any, *, page_cache: bool) -> Reader:
        reader: Reader = opened()
        naps.patch.setattr(reader, "wait_any", naps.before(reader.wait_any))
        return reader

    naps.patch.setattr(build, "open_reader", open_slow)


def slow_experts(naps: Naps) -> None:
    select = build.select_kernel

    def slow_kernel(*args: Any) -> Any:
        kernel = select(*args)
        return lambda weights, spec: naps.before(kernel(weights, spec))

    naps.patch.setattr(build, "select_kernel", slow_kernel)


def slow_products(naps: Naps) -> None:
    naps.patch.setattr(linear, "LEAST_WEIGHTS", 0)
    naps.patch.setattr(native, "matmul", naps.before(native.matmul))


def slow_evaluation(naps: Naps) -> None:
    naps.patch.setattr(mx, "eval", naps.before(mx.eval))


def slow_host(naps: Naps) -> None:
    """The observer naps."""


SLOW = {
    "reading": (slow_reading,),
    "experts": (slow_experts,),
    "computing": (slow_evaluation, *([slow_products] if NATIVE else [])),
    "host": (slow_host,),
}


@pytest.mark.parametrize(
    ("phase", "slow_down"), [(phase, each) for phase, ways in SLOW.items() for each in ways]
)
def test_a_phase_gets_what_was_spent_in_it(
    wide: Store, phase: str, slow_down: Callable[[Naps], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    naps = Naps(monkeypatch)
    slow_down(naps)
    with FlashMoEModel(wide, cache="min", prefetch=False) as model:
        if phase == "host":
            model.observe_routing(naps.before(lambda layer, experts: None))
        pieces = model.stream([1, 2, 3], 6, temperature=5.0, seed=2)
        next(pieces)
        naps.now = 0.0
        before = model.totals()
        monkeypatch.setattr(model._running.meter.clock, "_clock", lambda: naps.now)
        for _ in pieces:
            pass
        phases = asdict(model.totals().since(before).seconds.in_decode)
    # Five tokens, at least one nap each.
    assert naps.now >= 5
    assert phases == dict.fromkeys(phases, 0.0) | {phase: naps.now}
