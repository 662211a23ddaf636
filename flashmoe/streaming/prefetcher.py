"""Whether to prefetch the next layer's experts, and how many: earlier predictions decide.

No prediction changes a result: it only starts reads that a layer may need next.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from flashmoe.bank.bank import LayerBank

# From the input of a layer's experts to ids of the next layer's, likeliest first.
Predict = Callable[[mx.array], mx.array]

# A layer's width changes after so many prefetched records: up above GOOD, down below POOR. Below
# one half, wrong predictions cost a busy disk more than right ones save.
LEARN_AFTER = 16
GOOD, POOR = 0.7, 0.5
# A layer whose predictions are poor is tried again after so many tokens.
REST = 128
# Tokens with and without prefetch that are compared (half as many where these leave no doubt), and
# the tokens for which the faster way is kept.
WINDOW, HOLD = 8, 256


class Width:
    """How many of a layer's predicted experts are prefetched."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._width = most
        self._resting = 0
        self._seen = (0, 0)

    def next(self, prefetched: int, right: int) -> int:
        """The width for the next token, given the layer's totals."""
        if self._resting:
            self._resting -= 1
            if self._resting == 0:
                self._width, self._seen = 1, (prefetched, right)
            return self._width
        new = prefetched - self._seen[0]
        if new >= LEARN_AFTER:
            precision = (right - self._seen[1]) / new
            self._seen = (prefetched, right)
            if precision >= GOOD:
                self._width = min(self._width + 1, self._most)
            elif precision < POOR:
                self._width -= 1
                if self._width == 0:
                    self._resting = REST
        return self._width


class Trial:
    """Whether predicting pays at all: tokens with it and without it take turns, and the faster way
    is kept for a while."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        disturbed: Callable[[], bool] = lambda: False,
    ) -> None:
        """While it is `disturbed`, tokens' times say nothing about predicting."""
        self._clock = clock
        self._disturbed = disturbed
        self._pays = True
        self._last: float | None = None
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._left = 0
        self._claimed = False

    def claim(self) -> bool:
        """Whether the caller is the first, who has to call `next_token`."""
        claimed, self._claimed = self._claimed, True
        return not claimed

    @property
    def on(self) -> bool:
        """Whether to prediction for the token that has begun."""
        return self._pays

    def next_token(self) -> None:
        """Note that a token begins; decides `on` for it."""
        if self._disturbed():
            self._last = None
            return
        now = self._clock()
        before, self._last = self._last, now
        if self._left:
            self._left -= 1
            if self._left == 0:
                self._times = {True: [], False: []}
                self._pays = True
            return
        if before is not None:
            self._times[self._pays].append(now - before)
        noted = sum(map(len, self._times.values()))
        if noted < 2 * WINDOW and not (noted == WINDOW and self._is_plain()):
            # On, off, off, on: a bank that is filling up favours neither.
            self._pays = noted % 4 in (0, 3)
            return
        medians = {way: statistics.median(times) for way, times in self._times.items()}
        self._pays = medians[True] <= medians[False]
        self._left = HOLD

    def _is_plain(self) -> bool:
        """Whether every token with predictions was faster, or slower, than every one without."""
        own, other = self._times[True], self._times[False]
        return max(own) < min(other) or max(other) < min(own)


class Prefetcher:
    """A layer's predictions about the next one, whose bank is `bank`."""

    def __init__(self, predicted: Predict, bank: LayerBank, trial: Trial) -> None:
        self._predict = predicted
        self._bank = bank
        self._trial = trial
        # The first of a model's layers that predicts sees every token begin.
        self._leads = trial.claim()
        self._width = Width(bank.step_records)

    def predict(self, x: mx.array) -> mx.array | None:
        """Ids for one token, unevaluated; None when prefetch is off, or nothing is left to read."""
        if self._leads:
            self._trial.next_token()
        if not self._trial.on or self._bank.holds_all:
            return None
        return self._predict(x)

    def prefetch(self, ids: mx.array) -> None:
        """Start reading as many of the predicted experts as earlier predictions were worth."""
        width = self._width.next(self._bank.prefetched, self._bank.prefetched_used)
        self._bank.prefetch(np.array(ids).reshape(-1)[:width].tolist())
