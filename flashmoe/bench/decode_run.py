"""One model decoding for a while, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashmoe import machine
from flashmoe.bench.child import Share, run_apart
from flashmoe.bench.prompts import QUESTIONS
from flashmoe.engine import FlashMoEModel
from flashmoe.errors import FlashMoEError
from flashmoe.options import Options
from flashmoe.tuning import Choice, parse_choice

# So many tokens tell something; they may take this many times the seconds that were meant.
LEAST_TOKENS = 12
PATIENCE = 3
# A prompt's answer; then comes the next prompt, after the last one the first again.
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class DecodeRun:
    """What one process measured.

    `token_seconds` are those of each decoded token, first ones of answers left out; `bank_bytes`
    of the bank that ran, of at most `most_bank_bytes`.
    """

    token_seconds: tuple[float, ...]
    bank_bytes: int
    least_bank_bytes: int
    most_bank_bytes: int
    page_cache: bool
    hit_rate: float
    bytes_read: int
    load_seconds: float
    peak_memory_bytes: int


def decode_run(
    store: Path,
    memory: str | int | None,
    choice: Choice,
    *,
    tokens: int | None,
    seconds: float,
    limit_seconds: float,
    tick: Callable[[], None],
) -> DecodeRun:
    """Load a store in a new process and decode `tokens` greedily, or when that is None for
    `seconds` or LEAST_TOKENS, whichever is longer; for PATIENCE times `seconds` at most.

    `tick` is called again and again meanwhile. The same `tokens` are the same work whatever
    `choice` says. Raises what `run_apart` raises.
    """
    task = {
        "store": str(store.resolve()),
        "memory": memory,
        "choice": asdict(choice),
        "tokens": tokens,
        "seconds": seconds,
    }
    found = run_apart(decode_as_json, task, limit_seconds=limit_seconds, tick=tick)
    return DecodeRun(**{**found, "token_seconds": tuple(found["token_seconds"])})


def decode_as_json(task: dict[str, Any], progress: Share) -> dict[str, Any]:
    """What the new process does."""
    return asdict(_decode(task))


def _decode(what: dict[str, Any]) -> DecodeRun:
    options = Options(memory=what["memory"], tuned=parse_choice(what["choice"]))
    wanted: int | None = what["tokens"]

    def enough() -> bool:
        if wanted is None and seconds >= what["seconds"] and len(durations) >= LEAST_TOKENS:
            return True
        return len(durations) == wanted or seconds >= PATIENCE * what["seconds"]

    started = time.perf_counter()
    with FlashMoEModel.from_pretrained(what["store"], options) as model:
        loaded = time.perf_counter() - started
        durations: list[float] = []
        seconds = 0.0
        before = None
        number = 0
        while not enough():
            prompt = QUESTIONS[number % len(QUESTIONS)]
            number += 1
            decoded = len(durations)
            last: float | None = None
            for piece in model.stream(prompt, max_new_tokens=ANSWER_TOKENS):
                now = time.perf_counter()
                before = before or model.stats()
                if piece.token is None:
                    break
                if last is not None:
                    durations.append(now - last)
                    seconds += now - last
                last = now
                if enough():
                    break
            if decoded == len(durations) and number >= len(QUESTIONS):
                raise FlashMoEError(
                    "the model ends its answers at once: there is nothing to measure"
                )
        spent = model.stats() if before is None else model.stats().since(before)
        plan = model.memory_plan
        return DecodeRun(
            token_seconds=tuple(durations),
            bank_bytes=plan.bank_bytes,
            least_bank_bytes=plan.least_bank_bytes,
            most_bank_bytes=plan.most_bank_bytes,
            page_cache=model.page_cache,
            hit_rate=spent.hit_rate,
            bytes_read=spent.bytes_read,
            load_seconds=loaded,
            peak_memory_bytes=machine.peak_resident_set_bytes(),
        )
