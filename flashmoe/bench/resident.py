"""Decode speed of one model over bank sizes, beside the same weights resident in stock mlx-lm."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

from flashmoe.bench.prompts import QUESTIONS
from flashmoe.demo import DEMO_FOLDER
from flashmoe.engine.api import FlashMoEModel
from flashmoe.engine.model_cache import open_model
from flashmoe.generation.report import Ledger, Report
from flashmoe.generation.session import Answer, Session
from flashmoe.store.reader import is_store


@dataclass(frozen=True)
class ResidentResult:
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


@dataclass
class _Subject:
    """Something to measure, and what its rounds gave."""

    name: str
    bank_bytes: int | None
    session: Session
    rates: list[float] = field(default_factory=list)
    spent: list[Report] = field(default_factory=list)


def bench_resident(
    path_or_id: str | Path | None,
    *,
    prompts: Sequence[str] = QUESTIONS,
    max_tokens: int = 32,
    rounds: int = 5,
) -> list[ResidentResult]:
    """Answer `prompts` greedily in `rounds` rounds after one of warm-up.

    The subjects take turns within a round, so that a machine that speeds up or slows down does
    so for all of them; they are all in memory at once. The page cache is warm: this shows the
    engine's own cost and not the disk's. The resident model takes part when `path_or_id` is an
    MLX checkpoint folder (or the demo).
    """
    store = open_model(path_or_id)
    checkpoint = Path(DEMO_FOLDER if path_or_id is None else path_or_id)
    with FlashMoEModel(store, cache="min", dtype="float32") as model:
        least, most = model.memory_plan.least_bank_bytes, model.memory_plan.most_bank_bytes
    sizes = {"min": least, "half": max(least, most // 2), "full": most}
    with contextlib.ExitStack() as stack:
        subjects = []
        for name, bank_bytes in sizes.items():
            model = stack.enter_context(FlashMoEModel(store, cache=bank_bytes, dtype="float32"))
            subjects.append(_Subject(name, model.bank_bytes, model.session()))
        if checkpoint.is_dir() and not is_store(checkpoint):
            subjects.insert(0, _resident(checkpoint, model))
        for number in range(rounds + 1):
            for subject in subjects:
                _answer(subject, prompts, max_tokens)
                if number == 0:
                    subject.rates.clear()
                    subject.spent.clear()
    base = statistics.median(subjects[0].rates) if subjects[0].bank_bytes is None else None
    return [_summarise(subject, base) for subject in subjects]


def _resident(checkpoint: Path, model: FlashMoEModel) -> _Subject:
    """Stock mlx-lm with every weight in memory, driven by the same loop."""
    resident, _ = load_model(checkpoint)
    resident.set_dtype(mx.float32)
    mx.eval(resident.parameters())
    chunk = model.memory_plan.prompts.chunk_tokens
    session = Session(resident, model.tokenizer, Ledger(), context=model.context, chunk=chunk)
    return _Subject("resident", None, session)


def _answer(subject: _Subject, prompts: Sequence[str], max_tokens: int) -> None:
    reports = [
        Answer.of(subject.session.stream(prompt, max_new_tokens=max_tokens)).report
        for prompt in prompts
    ]
    # The first token of each answer comes out of the prompt, not out of a decode step.
    tokens = sum(report.generated_tokens - 1 for report in reports)
    subject.rates.append(tokens / sum(report.seconds.decode for report in reports))
    subject.spent += reports


def _summarise(subject: _Subject, base: float | None) -> ResidentResult:
    hits = sum(spent.hits for spent in subject.spent)
    accesses = hits + sum(spent.misses for spent in subject.spent)
    fed = sum(spent.generated_tokens + spent.fed_tokens for spent in subject.spent)
    median = statistics.median(subject.rates)
    is_resident = subject.bank_bytes is None
    return ResidentResult(
        name=subject.name,
        bank_bytes=subject.bank_bytes,
        hit_rate=hits / accesses if accesses else 1.0,
        bytes_read_per_token=sum(spent.bytes_read for spent in subject.spent) / fed,
        tokens_per_second=median,
        slowest=min(subject.rates),
        fastest=max(subject.rates),
        ratio=median / base if base and not is_resident else None,
    )
