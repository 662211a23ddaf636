"""The step loop: feed tokens, sample one, stop without computing one that nobody will see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from flashmoe.base.clock import PhaseClock
from flashmoe.base.progress import Progress
from flashmoe.generation.report import Ledger, Report
from flashmoe.generation.token_state import TokenState
from flashmoe.generation.turns import GivenUp, Turn

Sampler = Callable[[mx.array], mx.array]


def generate_tokens(
    state: TokenState,
    ids: Sequence[int],
    *,
    sampler: Sampler,
    max_tokens: int,
    stop_ids: set[int],
    ledger: Ledger,
    report: Report,
    turn: Turn,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Continue `ids`, yielding at most `max_tokens` token ids, a stop id being the last.

    What `state` has already consumed of `ids` is not fed again. The model runs in steps of
    `turn` alone; an answer that is stopped, or whose turn is cancelled, just ends. `report` is
    filled.
    """

    def stopped() -> bool:
        return turn.cancelled or should_stop()

    try:
        with turn.step(), ledger.measuring(report, "prefill"):
            known = state.rewind_to_prefix_of(ids)
            logits = state.feed(ids[known:], progress, stopped)
            ledger.count_prompt(report, len(state.ids), known)
        for count in range(1, max_tokens + 1):
            if logits is None or stopped():
                return
            with turn.step(), ledger.measuring(report, "decode"):
                token = _sample(logits, sampler, ledger.meter.clock)
                ledger.count_token(report)
            yield token
            if token in stop_ids or count == max_tokens or stopped():
                return
            with turn.step(), ledger.measuring(report, "decode"):
                logits = state.feed([token])
    except GivenUp:
        return


def _sample(logits: mx.array, sampler: Sampler, clock: PhaseClock) -> int:
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits)
    token: Any = sampler(logprobs[None])
    with clock.during("computing"):
        return int(token.item())
