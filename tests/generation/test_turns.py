"""Turns: first come, first served; given up, cancelled, dropped and closed."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from flashmoe import FlashMoEError
from flashmoe.generation.turns import GivenUp, Turns

PATIENCE = 10.0


def begin(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def ended(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_first_come_first_served() -> None:
    turns, served = Turns(), []
    first = turns.take()

    def wait(number: int) -> None:
        with turns.take() as turn, turn.step():
            served.append(number)

    threads = []
    for number in range(5):
        threads.append(begin(lambda number=number: wait(number)))  # type: ignore[misc]
        until(lambda number=number: len(turns._waiting) == number + 1)  # type: ignore[misc]
    assert served == []
    first.end()
    first.end()
    ended(*threads)
    assert served == [0, 1, 2, 3, 4]


def test_steps_exclude_one_another() -> None:
    turns = Turns()
    inside: list[int] = []
    most = 0

    def work() -> None:
        nonlocal most
        for _ in range(20):
            with turns.take() as turn:
                for _ in range(3):
                    with turn.step():
                        inside.append(1)
                        most = max(most, len(inside))
                        time.sleep(0.0001)
                        inside.pop()

    ended(*(begin(work) for _ in range(4)))
    assert most == 1


def test_a_waiting_call_is_given_up() -> None:
    turns, gone = Turns(), threading.Event()
    found: list[str] = []
    with turns.take():

        def wait() -> None:
            try:
                turns.take(should_stop=gone.is_set)
            except GivenUp:
                found.append("given up")

        thread = begin(wait)
        until(lambda: bool(turns._waiting))
        gone.set()
        ended(thread)
    assert found == ["given up"]
    assert not turns._waiting
    with turns.take() as turn, turn.step():
        pass


def test_a_thread_does_not_wait_for_itself() -> None:
    turns = Turns()
    with turns.take() as one, turns.take() as two:
        for turn in (one, two, one):
            with turn.step():
                pass


def test_a_step_within_a_step_is_refused() -> None:
    turns = Turns()
    refused = pytest.raises(FlashMoEError, match="in the middle of a step")
    with turns.take() as one, turns.take() as two, one.step(), refused, two.step():
        pytest.fail("ran")


def test_a_dropped_generator_frees_its_turn() -> None:
    turns = Turns()

    def answer() -> Iterator[int]:
        with turns.take() as turn:
            for number in range(3):
                with turn.step():
                    pass
                yield number

    stream = answer()
    next(stream)
    del stream
    gc.collect()
    assert not turns._running
    ended(begin(lambda: [*answer()] and None))  # type: ignore[func-returns-value]


class TestClosing:
    def test_waits_for_those_that_run_and_wait(self) -> None:
        turns, done, go = Turns(), [], threading.Event()

        def work(number: int) -> None:
            with turns.take() as turn, turn.step():
                go.wait(PATIENCE)
                done.append(number)

        threads = [begin(lambda n=n: work(n)) for n in range(3)]  # type: ignore[misc]
        until(lambda: len(turns._waiting) == 2)
        threading.Timer(0.05, go.set).start()
        turns.close()
        assert sorted(done) == [0, 1, 2]
        ended(*threads)
        with pytest.raises(FlashMoEError, match="closed"):
            turns.take()
        turns.close()

    def test_cancels_on_demand(self) -> None:
        turns, outcomes, begun = Turns(), [], threading.Event()

        def work() -> None:
            try:
                with turns.take() as turn:
                    for _ in range(10**6):
                        with turn.step():
                            begun.set()
                            time.sleep(0.001)
                outcomes.append("whole")
            except GivenUp:
                outcomes.append("cancelled")

        threads = [begin(work) for _ in range(3)]
        begun.wait(PATIENCE)
        turns.close(cancel=True)
        ended(*threads)
        assert outcomes == ["cancelled"] * 3

    def test_cancels_what_was_left_half_way(self) -> None:
        turns, left, leave = Turns(), threading.Event(), threading.Event()
        found: list[str] = []

        def work() -> None:
            turn = turns.take()
            with turn.step():
                pass
            left.set()
            leave.wait(PATIENCE)
            try:
                with turn.step():
                    pytest.fail("ran")
            except GivenUp:
                found.append("cancelled")

        thread = begin(work)
        left.wait(PATIENCE)
        turns.close(cancel=True)
        leave.set()
        ended(thread)
        assert found == ["cancelled"]

    def test_does_not_wait_for_the_thread_that_closes(self) -> None:
        turns = Turns()
        turn = turns.take()
        turns.close()
        with pytest.raises(FlashMoEError, match="closed"), turn.step():
            pytest.fail("ran")
