"""Turns: who may run the model now. One answer at a time, first come first served.

Knows threads and answers; knows no model.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flashmoe.base.errors import FlashMoEError

# How often a waiting call looks whether it has been given up.
LOOK_SECONDS = 0.05


class GivenUp(Exception):
    """A waiting call was given up before its turn came, or a running one was cancelled."""


class Turns:
    """The queue of one model's answers.

    The thread whose turn it is may begin further answers at once, because it would wait for
    itself otherwise; it takes their steps one by one.
    """

    def __init__(self) -> None:
        # Its lock may be taken again by the thread that has it: a dropped generator ends its turn
        # wherever Python happens to collect it.
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[Turn] = deque()
        self._running: set[Turn] = set()
        self._thread: int | None = None
        # The thread that is in a step.
        self._stepping: int | None = None
        self._closed = False

    def take(self, should_stop: Callable[[], bool] = lambda: False) -> Turn:
        """Wait for a turn, behind all that asked before.

        `should_stop` is asked while waiting. Raises GivenUp when it turns true or `close`
        cancels, and FlashMoEError once the model is closed.
        """
        turn = Turn(self)
        with self._changed:
            self.check_open()
            if not self._running or self._thread != threading.get_ident():
                self._wait_for(turn, should_stop)
                self._thread = threading.get_ident()
            self._running.add(turn)
        return turn

    def close(self, *, cancel: bool = False) -> None:
        """Refuse new answers, and return once nobody runs the model any more.

        Answers that run or wait are finished first, or end at their next step when `cancel` is
        true. Those of the calling thread are over: it cannot go on with them in here.
        """
        with self._changed:
            self._closed = True
            for turn in [*self._running, *self._waiting]:
                own = turn in self._running and self._thread == threading.get_ident()
                if cancel:
                    turn.cancelled = True
                if own or (cancel and self._stepping is None):
                    self._running.discard(turn)
            self._changed.notify_all()
            while self._waiting or self._running:
                self._changed.wait(LOOK_SECONDS)
                if cancel and self._stepping is None:
                    # Nobody has to come back to an answer that was left half-way.
                    self._running.clear()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def _wait_for(self, turn: Turn, should_stop: Callable[[], bool]) -> None:
        self._waiting.append(turn)
        try:
            while self._running or self._waiting[0] is not turn:
                if turn.cancelled or should_stop():
                    raise GivenUp
                self._changed.wait(LOOK_SECONDS)
        finally:
            self._waiting.remove(turn)
            self._changed.notify_all()

    def _begin_step(self, turn: Turn) -> None:
        with self._changed:
            if self._stepping == threading.get_ident():
                raise FlashMoEError(
                    "the model is in the middle of a step; ask it again when that has returned"
                )
            while self._stepping is not None:
                self._changed.wait(LOOK_SECONDS)
            if turn.cancelled:
                raise GivenUp
            if turn not in self._running:
                self.check_open()
                raise FlashMoEError("this answer has ended; ask again")
            self._stepping = threading.get_ident()

    def _end_step(self) -> None:
        with self._changed:
            self._stepping = None
            self._changed.notify_all()

    def _end(self, turn: Turn) -> None:
        with self._changed:
            self._running.discard(turn)
            self._changed.notify_all()

    def check_open(self) -> None:
        """Raise FlashMoEError once the model is closed."""
        if self._closed:
            raise FlashMoEError("the model is closed; load it again with from_pretrained")


class Turn:
    """One answer's turn, from `Turns.take` to `end`; a context manager that ends it."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.cancelled = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run the model in here, and nowhere else; what is between steps may take any time.

        Raises GivenUp when the answer was cancelled, and FlashMoEError when the model is closed
        or a step is tried within a step.
        """
        self._turns._begin_step(self)
        try:
            yield
        finally:
            self._turns._end_step()

    def end(self) -> None:
        """Let the next one have its turn; ending twice is fine."""
        self._turns._end(self)

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
