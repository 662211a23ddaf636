"""Keeps the process at its number: banks give memory to what grows, and take what nobody uses.

`decide` is the whole of the judgement, from what was measured to the banks' size, and touches
nothing; `Governor` measures, asks it, and has banks resized.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flashmoe.base import machine
from flashmoe.memory.balance import Balance
from flashmoe.memory.budget import LayerDemand, least_bank_bytes, most_bank_bytes, share_slots

# Of the number, what is kept free for what no estimate knows; at least so much.
MARGIN_SHARE = 1 / 200
LEAST_MARGIN_BYTES = 3 * 10**6
# Smallest resize, as a share of the number: in place, and where arrays must be reallocated.
STEP_SHARE = 1 / 200
BIG_STEP_SHARE = 1 / 16
# Of the memory that a process finds at its start, what it leaves to others, within these bounds.
FLOOR_SHARE = 1 / 50
LEAST_FLOOR_BYTES, MOST_FLOOR_BYTES = 16 * 10**6, 10**9
# What is given up for others comes back once there are so many floors for so long.
CALM_FLOORS = 2
CALM_SECONDS = 10.0
# Where the system says that memory is short, but not by how much: this share of the banks.
PRESSED_SHARE = 1 / 8
# Single tokens between two looks, and how much time at most.
LOOK_TOKENS = 16
LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Limits:
    """What banks may have at all.

    `total_bytes` is the number for the process, `margin_bytes` of it are never planned with.
    `floor_bytes` is what the machine is to keep for others. Banks have `least_bytes` to
    `most_bytes`, grow by at least `step_bytes`, and shrink `in_steps` of that or by the byte.
    """

    total_bytes: int
    margin_bytes: int
    floor_bytes: int
    least_bytes: int
    most_bytes: int
    step_bytes: int
    in_steps: bool = False

    @classmethod
    def of(
        cls,
        total_bytes: int,
        demands: Sequence[LayerDemand],
        *,
        found_bytes: int,
        in_place: bool,
    ) -> Limits:
        """`found_bytes`: what the process has and could have had when it was loaded."""
        share = STEP_SHARE if in_place else BIG_STEP_SHARE
        floor = min(max(int(found_bytes * FLOOR_SHARE), LEAST_FLOOR_BYTES), MOST_FLOOR_BYTES)
        return cls(
            total_bytes=total_bytes,
            margin_bytes=max(int(total_bytes * MARGIN_SHARE), LEAST_MARGIN_BYTES),
            floor_bytes=floor,
            least_bytes=least_bank_bytes(demands),
            most_bytes=most_bank_bytes(demands),
            step_bytes=int(total_bytes * share),
            in_steps=not in_place,
        )


@dataclass(frozen=True)
class MemoryReading:
    """What was measured before a step.

    `resident_bytes` is what the process has in RAM, `bank_bytes` of it in banks.
    `coming_bytes` is what the step takes on top, at most. `usable_bytes` is what the machine
    could still give; `pressed` that it says itself that memory is short. `settled`: banks may
    grow, because steps like this one will go on.
    """

    resident_bytes: int
    bank_bytes: int
    coming_bytes: int
    usable_bytes: int
    pressed: bool = False
    settled: bool = True
    seconds: float = 0.0


@dataclass(frozen=True)
class Pressure:
    """What others need: banks have at most `ceiling_bytes`, None being no bound.

    `calm_since` is when there was last enough for all, None while there is not.
    """

    ceiling_bytes: int | None = None
    calm_since: float | None = None


def decide(limits: Limits, reading: MemoryReading, pressure: Pressure) -> tuple[int, Pressure]:
    """The banks' size before a step, and what is remembered for the next decision.

    Shrinks as soon as the number or the machine's floor would not hold, grows by a step or more
    only. Never outside `least_bytes` and `most_bytes`, even if neither can hold then.
    """
    beside = reading.resident_bytes - reading.bank_bytes + reading.coming_bytes
    within = limits.total_bytes - limits.margin_bytes - beside
    # What the machine has to spare above its floor once the step has taken its part.
    spare = reading.usable_bytes - reading.coming_bytes - limits.floor_bytes
    pressure = _feel(limits, reading, pressure, spare)
    ceiling = pressure.ceiling_bytes
    target = within if ceiling is None else min(within, ceiling)
    # Whatever the number allows, there is no more than the machine has.
    target = min(target, reading.bank_bytes + max(spare, 0))
    if target < reading.bank_bytes and limits.in_steps:
        short = reading.bank_bytes - target
        target = reading.bank_bytes - -(-short // limits.step_bytes) * limits.step_bytes
    target = min(max(target, limits.least_bytes), limits.most_bytes)
    if target <= reading.bank_bytes:
        return target, pressure
    # The last bit up to everything is worth a step, however small.
    enough = target - reading.bank_bytes >= limits.step_bytes or target == limits.most_bytes
    return (target if enough and reading.settled else reading.bank_bytes), pressure


def _feel(limits: Limits, reading: MemoryReading, pressure: Pressure, spare: int) -> Pressure:
    """How the machine's memory bounds the banks now."""
    if spare < 0 or reading.pressed:
        short = max(-spare, int(reading.bank_bytes * PRESSED_SHARE) if reading.pressed else 0)
        ceiling = max(reading.bank_bytes - short, limits.least_bytes)
        known = pressure.ceiling_bytes
        return Pressure(ceiling if known is None else min(known, ceiling))
    if pressure.ceiling_bytes is None:
        return pressure
    if spare < (CALM_FLOORS - 1) * limits.floor_bytes:
        return Pressure(pressure.ceiling_bytes)
    if pressure.calm_since is None:
        return Pressure(pressure.ceiling_bytes, reading.seconds)
    if reading.seconds - pressure.calm_since < CALM_SECONDS:
        return pressure
    # Half of what is spare, so that growing back is not what makes memory short again.
    ceiling = reading.bank_bytes + spare // 2
    if ceiling >= limits.most_bytes:
        return Pressure()
    return Pressure(max(ceiling, pressure.ceiling_bytes), reading.seconds)


class Governor:
    """Resizes the banks of one model before steps that need it.

    `slots` are the layers' present counts, `resize` changes them. `coming(known, new, held)` is
    what feeding `new` tokens behind `known` ones takes on top, at most, when caches of tokens
    have `held` bytes already. With a `balance`, layers' shares follow what they need.
    """

    def __init__(
        self,
        limits: Limits,
        demands: Sequence[LayerDemand],
        *,
        slots: Callable[[], Sequence[int]],
        resize: Callable[[Sequence[int]], None],
        coming: Callable[[int, int, int], int],
        balance: Balance | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._demands = demands
        self._slots = slots
        self._resize = resize
        self._coming = coming
        self._balance = balance
        self._clock = clock
        self._pressure = Pressure()
        self._looked = -LOOK_SECONDS
        self._peak_bytes = machine.peak_resident_set_bytes()
        self.n_resizes = 0

    @property
    def bank_bytes(self) -> int:
        """Memory of all slots."""
        pairs = zip(self._slots(), self._demands, strict=True)
        return sum(n * demand.slot_bytes for n, demand in pairs)

    def before_step(self, known: int, new: int, held: Callable[[], int]) -> None:
        """Make room for feeding `new` tokens behind `known` ones, and use what is left over.

        Looks before every part of a prompt, and before single tokens now and then.
        """
        now = self._clock()
        single = new == 1
        if single and self._balance is not None:
            self._balance.count_token()
        if single and known % LOOK_TOKENS and now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        self._learn()
        coming = self._coming(known, new, held())
        settled = single and known % LOOK_TOKENS == 0
        before = self.bank_bytes
        target, pressure = decide(
            self.limits, self._read(before, coming, settled, now), self._pressure
        )
        if target < before:
            # What the allocator keeps of freed memory goes first.
            machine.release_freed_memory()
            target, pressure = decide(
                self.limits, self._read(before, coming, settled, now), self._pressure
            )
        self._pressure = pressure
        moves = settled and self._balance is not None and self._balance.learn(self._slots())
        if target != before or moves:
            wanted = self._share(target)
            if list(wanted) != list(self._slots()):
                self._resize(wanted)
                self.n_resizes += 1

    def _share(self, bank_bytes: int) -> tuple[int, ...]:
        if self._balance is None:
            return share_slots(self._demands, bank_bytes)
        return self._balance.share(bank_bytes)

    def _read(self, bank_bytes: int, coming_bytes: int, settled: bool, now: float) -> MemoryReading:
        return MemoryReading(
            resident_bytes=machine.resident_set_bytes(),
            bank_bytes=bank_bytes,
            coming_bytes=coming_bytes,
            usable_bytes=machine.usable_memory_bytes(),
            pressed=machine.memory_is_short(),
            settled=settled,
            seconds=now,
        )

    def _learn(self) -> None:
        """Keep a wider margin where a step took more than was thought."""
        peak = machine.peak_resident_set_bytes()
        over = peak - self.limits.total_bytes
        if peak > self._peak_bytes and over > 0:
            self.limits = replace(self.limits, margin_bytes=self.limits.margin_bytes + over)
        self._peak_bytes = peak
