"""Who decides how large banks are: every branch without a model, and the thin rest around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.base import machine
from flashmoe.memory.balance import LEARN_TOKENS, Balance
from flashmoe.memory.budget import LayerDemand
from flashmoe.memory.governor import (
    CALM_SECONDS,
    LOOK_SECONDS,
    LOOK_TOKENS,
    Governor,
    Limits,
    MemoryReading,
    Pressure,
    decide,
)

MB = 10**6
LIMITS = Limits(
    total_bytes=1000 * MB,
    margin_bytes=5 * MB,
    floor_bytes=50 * MB,
    least_bytes=100 * MB,
    most_bytes=800 * MB,
    step_bytes=10 * MB,
)
# 300 MB beside the banks, 20 coming: banks may have 675 MB.
STEADY = MemoryReading(
    resident_bytes=900 * MB, bank_bytes=600 * MB, coming_bytes=20 * MB, usable_bytes=10**10
)
CALM = Pressure()


def size(reading: MemoryReading, limits: Limits = LIMITS, pressure: Pressure = CALM) -> float:
    return decide(limits, reading, pressure)[0] / MB


class TestTheNumber:
    def test_what_is_left_over_goes_to_the_banks(self) -> None:
        assert size(STEADY) == 675

    def test_not_less_than_a_step(self) -> None:
        assert size(replace(STEADY, coming_bytes=86 * MB)) == 600
        assert size(replace(STEADY, coming_bytes=85 * MB)) == 610

    def test_the_last_bit_is_worth_less_than_a_step(self) -> None:
        full = replace(STEADY, resident_bytes=500 * MB, bank_bytes=795 * MB)
        assert size(full) == 800

    def test_not_while_steps_differ(self) -> None:
        assert size(replace(STEADY, settled=False)) == 600

    def test_what_is_coming_takes_from_the_banks_to_the_byte(self) -> None:
        assert size(replace(STEADY, coming_bytes=96 * MB)) == 599
        assert size(replace(STEADY, coming_bytes=200 * MB, settled=False)) == 495

    def test_what_came_unforeseen_does_too(self) -> None:
        assert size(replace(STEADY, resident_bytes=1001 * MB)) == 574

    def test_never_below_one_tokens_needs(self) -> None:
        assert size(replace(STEADY, coming_bytes=10**12)) == 100

    def test_never_more_than_everything(self) -> None:
        assert size(replace(STEADY, resident_bytes=600 * MB)) == 800

    def test_big_steps_where_arrays_are_replaced(self) -> None:
        limits = replace(LIMITS, in_steps=True, step_bytes=60 * MB)
        assert size(replace(STEADY, coming_bytes=96 * MB), limits) == 540
        assert size(replace(STEADY, coming_bytes=155 * MB), limits) == 540
        assert size(replace(STEADY, coming_bytes=156 * MB), limits) == 480
        assert size(replace(STEADY, coming_bytes=36 * MB), limits) == 600
        assert size(STEADY, limits) == 675


class TestTheMachine:
    def test_no_more_than_it_has(self) -> None:
        # 20 are coming and 50 stay: 30 are left, for banks that could have 75 more.
        assert size(replace(STEADY, usable_bytes=100 * MB)) == 630
        assert size(replace(STEADY, usable_bytes=75 * MB)) == 600

    def test_what_others_lack_is_given_up(self) -> None:
        target, pressure = decide(LIMITS, replace(STEADY, usable_bytes=30 * MB), CALM)
        assert target == 560 * MB
        assert pressure == Pressure(560 * MB)

    def test_a_number_that_the_machine_does_not_have(self) -> None:
        assert size(replace(STEADY, usable_bytes=0, coming_bytes=700 * MB)) == 100

    def test_a_warning_from_the_system(self) -> None:
        target, pressure = decide(LIMITS, replace(STEADY, pressed=True), CALM)
        assert (target, pressure) == (525 * MB, Pressure(525 * MB))

    def test_the_ceiling_stays_until_it_is_calm_for_a_while(self) -> None:
        held = Pressure(600 * MB)
        tight = replace(STEADY, usable_bytes=119 * MB, seconds=5.0)
        assert decide(LIMITS, tight, held) == (600 * MB, held)
        calm = replace(STEADY, usable_bytes=120 * MB, seconds=7.0)
        target, waiting = decide(LIMITS, calm, held)
        assert (target, waiting) == (600 * MB, Pressure(600 * MB, 7.0))
        soon = replace(calm, seconds=7.0 + CALM_SECONDS - 0.1)
        assert decide(LIMITS, soon, waiting) == (600 * MB, waiting)
        later = replace(calm, seconds=7.0 + CALM_SECONDS)
        # Half of the 50 MB to spare.
        assert decide(LIMITS, later, waiting) == (625 * MB, Pressure(625 * MB, later.seconds))

    def test_calm_that_ends_has_to_begin_again(self) -> None:
        waiting = Pressure(600 * MB, 7.0)
        tight = replace(STEADY, usable_bytes=100 * MB, seconds=8.0)
        assert decide(LIMITS, tight, waiting)[1] == Pressure(600 * MB)

    def test_plenty_lifts_the_ceiling(self) -> None:
        waiting = Pressure(300 * MB, 0.0)
        reading = replace(STEADY, seconds=CALM_SECONDS)
        assert decide(LIMITS, reading, waiting) == (675 * MB, CALM)

    def test_pressure_again_lowers_it_only(self) -> None:
        less = replace(STEADY, bank_bytes=500 * MB, usable_bytes=60 * MB)
        assert decide(LIMITS, less, Pressure(400 * MB, 1.0))[1] == Pressure(400 * MB)


readings = st.builds(
    MemoryReading,
    resident_bytes=st.integers(0, 2000 * MB),
    bank_bytes=st.integers(100 * MB, 800 * MB),
    coming_bytes=st.integers(0, 500 * MB),
    usable_bytes=st.integers(0, 3000 * MB),
    pressed=st.booleans(),
    settled=st.booleans(),
    seconds=st.floats(0, 100),
).map(lambda r: replace(r, resident_bytes=r.resident_bytes + r.bank_bytes))
pressures = st.builds(
    Pressure,
    st.none() | st.integers(100 * MB, 800 * MB),
    st.none() | st.floats(0, 100),
)
limits = st.builds(
    replace, st.just(LIMITS), in_steps=st.booleans(), step_bytes=st.integers(MB, 200 * MB)
)


@given(limits, readings, pressures)
def test_always(limits: Limits, reading: MemoryReading, pressure: Pressure) -> None:
    target, after = decide(limits, reading, pressure)
    assert limits.least_bytes <= target <= limits.most_bytes
    beside = reading.resident_bytes - reading.bank_bytes
    least = target == limits.least_bytes
    assert beside + target + reading.coming_bytes <= limits.total_bytes - limits.margin_bytes or (
        least
    )
    if after.ceiling_bytes is not None:
        assert target <= after.ceiling_bytes
    grown = target - reading.bank_bytes
    if grown > 0:
        assert reading.settled
        assert reading.usable_bytes - reading.coming_bytes - grown >= limits.floor_bytes
        assert grown >= limits.step_bytes or target == limits.most_bytes
    # Once it is done, nothing more is to be done.
    done = replace(
        reading,
        resident_bytes=reading.resident_bytes + grown,
        bank_bytes=target,
        usable_bytes=max(reading.usable_bytes - grown, 0),
        pressed=False,
    )
    again, _ = decide(limits, done, after)
    assert again == target or least


def test_limits() -> None:
    demands = [LayerDemand(MB, 2, 100)] * 4
    small = Limits.of(300 * MB, demands, found_bytes=500 * MB, in_place=True)
    assert (small.least_bytes, small.most_bytes) == (8 * MB, 400 * MB)
    assert (small.margin_bytes, small.floor_bytes, small.step_bytes) == (3 * MB, 16 * MB, 1_500_000)
    large = Limits.of(48 * 10**9, demands, found_bytes=60 * 10**9, in_place=False)
    assert (large.margin_bytes, large.floor_bytes) == (240 * MB, 10**9)
    assert (large.step_bytes, large.in_steps, small.in_steps) == (3 * 10**9, True, False)


class Machine:
    """A process with `beside` bytes beside its banks, on a machine with room for `ram` bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.demands = [LayerDemand(MB, 2, 100)] * 4
        self.slots = [50] * 4
        self.beside = 100 * MB
        self.others = 0
        self.ram = 1000 * MB
        self.coming = 0
        self.peak = 0
        self.short = False
        self.now = 0.0
        self.asked: list[tuple[int, int, int]] = []
        self.trims = 0
        for name, value in {
            "resident_set_bytes": lambda: self.resident,
            "peak_resident_set_bytes": lambda: max(self.peak, self.resident),
            "usable_memory_bytes": lambda: self.ram - self.resident - self.others,
            "memory_is_short": lambda: self.short,
            "release_freed_memory": self.trim,
        }.items():
            monkeypatch.setattr(machine, name, value)

    @property
    def resident(self) -> int:
        return self.beside + sum(self.slots) * MB

    def trim(self) -> None:
        self.trims += 1

    def ask(self, known: int, new: int, held: int) -> int:
        self.asked.append((known, new, held))
        return self.coming

    def governor(self, balance: Balance | None = None) -> Governor:
        def resize(slots: Sequence[int]) -> None:
            self.slots = list(slots)

        return Governor(
            Limits.of(400 * MB, self.demands, found_bytes=1000 * MB, in_place=True),
            self.demands,
            slots=lambda: self.slots,
            resize=resize,
            coming=self.ask,
            balance=balance,
            clock=lambda: self.now,
        )


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def no_cache() -> int:
    return 0


class TestGovernor:
    def test_single_tokens_are_looked_at_now_and_then(self, process: Machine) -> None:
        governor = process.governor()
        for known in range(1, 3 * LOOK_TOKENS + 1):
            governor.before_step(known, 1, lambda: 7)
        assert process.asked == [(n, 1, 7) for n in (1, 16, 32, 48)]
        process.now += LOOK_SECONDS
        governor.before_step(49, 1, no_cache)
        governor.before_step(50, 1, no_cache)
        assert len(process.asked) == 5

    def test_every_part_of_a_prompt_is(self, process: Machine) -> None:
        governor = process.governor()
        for known in (0, 5, 300):
            governor.before_step(known, 256, no_cache)
        assert len(process.asked) == 3

    def test_banks_give_way_and_come_back(self, process: Machine) -> None:
        governor = process.governor()
        governor.before_step(0, 1, no_cache)
        assert (process.slots, governor.bank_bytes) == ([75, 74, 74, 74], 297 * MB)
        process.coming = 100 * MB
        governor.before_step(16, 200, no_cache)
        assert process.slots == [50, 49, 49, 49]
        process.coming = 0
        governor.before_step(216, 1, no_cache)
        assert sum(process.slots) == 197
        governor.before_step(224, 1, no_cache)
        assert sum(process.slots) == 297
        assert governor.n_resizes == 3

    def test_freed_memory_is_given_back_before_slots_are(
        self, process: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        governor = process.governor()
        governor.before_step(0, 1, no_cache)
        assert process.trims == 0
        process.beside += 3 * MB

        def trim() -> None:
            process.beside -= 3 * MB

        monkeypatch.setattr(machine, "release_freed_memory", trim)
        governor.before_step(16, 1, no_cache)
        assert (sum(process.slots), governor.n_resizes) == (297, 1)

    def test_others_come_and_go(self, process: Machine) -> None:
        governor = process.governor()
        sizes = []
        for known in range(0, 800, 16):
            process.others = 600 * MB if 100 < known < 400 else 0
            governor.before_step(known, 1, no_cache)
            sizes.append(sum(process.slots))
            process.now += 1.0
            assert process.ram - process.resident - process.others >= 20 * MB
        assert min(sizes) == 280
        assert (sizes[0], sizes[10], sizes[-1]) == (297, 280, 297)
        assert governor.n_resizes == 3

    def test_a_system_that_warns(self, process: Machine) -> None:
        governor = process.governor()
        governor.before_step(0, 1, no_cache)
        process.short = True
        for known in range(16, 16 * 60, 16):
            governor.before_step(known, 1, no_cache)
        assert process.slots == [2] * 4

    def test_a_step_that_took_more_than_was_thought(self, process: Machine) -> None:
        governor = process.governor()
        governor.before_step(0, 1, no_cache)
        process.peak = 404 * MB
        governor.before_step(16, 1, no_cache)
        assert sum(process.slots) == 293
        governor.before_step(32, 1, no_cache)
        assert sum(process.slots) == 293

    def test_a_size_that_makes_no_slot_is_none(self, process: Machine) -> None:
        governor = process.governor()
        governor.before_step(0, 1, no_cache)
        process.beside -= MB
        governor.before_step(16, 1, no_cache)
        assert governor.n_resizes == 1

    def test_layers_that_need_more_get_more(self, process: Machine) -> None:
        uses = [np.zeros(100, np.int64) for _ in range(4)]
        balance = Balance(process.demands, lambda: uses)
        governor = process.governor(balance=balance)
        for known in range(LEARN_TOKENS + LOOK_TOKENS):
            uses[0][known % 10] += 1
            for counts in uses[1:]:
                counts[known % 100] += 1
            governor.before_step(known, 1, no_cache)
            if known < LEARN_TOKENS - LOOK_TOKENS:
                assert process.slots in ([50] * 4, [75, 74, 74, 74])
        assert process.slots[0] < 20
        assert sum(process.slots) == 297
        # Under the same number, and with these shares from now on.
        process.coming = 60 * MB
        governor.before_step(known + 1, 200, no_cache)
        assert process.slots[0] < 20
        assert sum(process.slots) == 237
