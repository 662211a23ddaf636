"""Decode speed of one model over bank sizes, beside the same weights resident in stock mlx-lm."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

from flashmoe.demo import DEMO_FOLDER
from flashmoe.engine import DEFAULT_CONTEXT, PREFILL_CHUNK, FlashMoEModel, open_model
from flashmoe.generation.session import Session
from flashmoe.store.reader import is_store
from flashmoe.streaming.budget import layer_demands, least_bank_bytes
from flashmoe.streaming.telemetry import Stats

PROMPTS = (
    "What is a barn?",
    "What is the capital of the United States?",
    "Define scent.",
    "What is a violin?",
    "What does it mean to walk?",
    "Define river.",
)


@dataclass(frozen=True)
class DecodeResult:
    """One bank size, or the resident model (`bank_bytes` None).

    `tokens_per_second` is the median over rounds of decoded tokens by decode time, `slowest` and
    `fastest` its extremes; `ratio` divides it by the resident model's (None without one).
    """

    name: str
    bank_bytes: int | None
    hit_rate: float
    bytes_read_per_token: float
    tokens_per_second: float
    slowest: float
    fastest: float
    ratio: float | None


@dataclass(frozen=True)
class _Round:
    tokens_per_second: float
    stats: Stats


def bench_decode(
    path_or_id: str | Path | None,
    *,
    prompts: Sequence[str] = PROMPTS,
    max_tokens: int = 32,
    rounds: int = 5,
) -> list[DecodeResult]:
    """Answer `prompts` greedily `rounds` times per bank size, after one warm-up round.

    The page cache is warm, so this shows the engine's own cost and not the disk's. The resident
    model is measured when `path_or_id` is a float32-able MLX checkpoint folder (or the demo).
    """
    store = open_model(path_or_id)
    checkpoint = Path(DEMO_FOLDER if path_or_id is None else path_or_id)
    demands = layer_demands([layer.layout for layer in store.manifest.layers], widen=True)
    least = least_bank_bytes(demands)
    most = sum(demand.most * demand.slot_bytes for demand in demands)
    results: list[DecodeResult] = []
    base = None
    with FlashMoEModel(store, cache=least) as model:
        if checkpoint.is_dir() and not is_store(checkpoint):
            measured = _measure(_resident_session(checkpoint, model), prompts, max_tokens, rounds)
            results.append(_summarise("resident", None, measured, None))
            base = results[0].tokens_per_second
    for name, bank_bytes in (("min", least), ("half", max(least, most // 2)), ("full", most)):
        with FlashMoEModel(store, cache=bank_bytes) as model:
            measured = _measure((model.session(), model.live_stats), prompts, max_tokens, rounds)
            results.append(_summarise(name, model.bank_bytes, measured, base))
    return results


def _resident_session(checkpoint: Path, model: FlashMoEModel) -> tuple[Session, Stats]:
    """A session over stock mlx-lm with every weight in memory, driven by the same loop."""
    resident, _ = load_model(checkpoint)
    resident.set_dtype(mx.float32)
    mx.eval(resident.parameters())
    stats = Stats()
    context = min(DEFAULT_CONTEXT, model.context)
    return Session(resident, model.tokenizer, stats, context=context, chunk=PREFILL_CHUNK), stats


def _measure(
    subject: tuple[Session, Stats], prompts: Sequence[str], max_tokens: int, rounds: int
) -> list[_Round]:
    session, stats = subject
    measured = []
    for _ in range(rounds + 1):
        before = stats.copy()
        for prompt in prompts:
            for _piece in session.stream(prompt, max_new_tokens=max_tokens):
                pass
        spent = stats.since(before)
        # The first token of each answer comes out of the prompt, not out of a decode step.
        decoded = spent.tokens - len(prompts)
        measured.append(_Round(decoded / spent.seconds.decode, spent))
    return measured[1:]


def _summarise(
    name: str, bank_bytes: int | None, measured: list[_Round], base: float | None
) -> DecodeResult:
    rates = [one.tokens_per_second for one in measured]
    hits = sum(one.stats.hits for one in measured)
    accesses = hits + sum(one.stats.misses for one in measured)
    fed = sum(one.stats.tokens + one.stats.prompt_tokens for one in measured)
    median = statistics.median(rates)
    return DecodeResult(
        name=name,
        bank_bytes=bank_bytes,
        hit_rate=hits / accesses if accesses else 1.0,
        bytes_read_per_token=sum(one.stats.bytes_read for one in measured) / fed,
        tokens_per_second=median,
        slowest=min(rates),
        fastest=max(rates),
        ratio=median / base if base else None,
    )
