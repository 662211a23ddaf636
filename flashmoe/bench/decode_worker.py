"""One point of `bench decode`: a model in a process of its own answers prompts.

Returns what was counted and timed; what it means is the business of `bench/pass_figures.py`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from flashmoe.base import machine
from flashmoe.base.errors import FlashMoEError, PromptError
from flashmoe.base.progress import ShareProgress
from flashmoe.bench.child_process import run_apart
from flashmoe.engine.api import FlashMoEModel
from flashmoe.engine.options import Options
from flashmoe.generation.prompt import encode_prompt
from flashmoe.generation.report import Report
from flashmoe.generation.session import Answer, Sampling, Session
from flashmoe.kernels.select import resolve_kernel
from flashmoe.store.reader import open_store

# How often a step past an answer's end is done again, after one time that does not count.
REPEATS = 2


@dataclass(frozen=True)
class Point:
    """What to run: a store with `options` (fields of `Options`).

    Each pass answers every prompt with up to `max_tokens` tokens, and goes round again until it
    has decoded that many.
    """

    store: str
    options: dict[str, Any]
    prompts: tuple[str, ...]
    passes: tuple[str, ...]
    max_tokens: int
    temperature: float = 0.0
    template: bool = True


@dataclass
class Pass:
    """One pass over the prompts.

    Per answer: the tokens, the seconds from the question to the first of them, the tokens of
    the prompt and the seconds it took to feed. Per decoded token (all but each answer's first):
    the seconds from one to the next. `decode` is what was counted while these were decoded.
    `computing_seconds`: a step past an answer's end, done again with all of its experts in the
    bank; none where that cannot be done.
    """

    name: str
    answers: list[list[int]] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    prefill_seconds: list[float] = field(default_factory=list)
    token_seconds: list[float] = field(default_factory=list)
    decode: dict[str, float] = field(default_factory=dict)
    computing_seconds: list[float] = field(default_factory=list)

    def add(self, first: Report, whole: Report) -> None:
        """Add what decoding one answer took: the figures of the `whole` without those up to the
        `first` token; `seconds` in all and by phase."""
        names = ("hits", "misses", "bytes_read", "bytes_demanded", "bytes_absent")
        counted = {
            "tokens": whole.generated_tokens - first.generated_tokens,
            **{name: getattr(whole, name) - getattr(first, name) for name in names},
            "seconds": whole.seconds.decode - first.seconds.decode,
            **asdict(whole.seconds.in_decode - first.seconds.in_decode),
        }
        for name, value in counted.items():
            self.decode[name] = self.decode.get(name, 0) + value


@dataclass
class PointRun:
    """What a point gave; `most_bank_bytes` would hold every expert."""

    bank_bytes: int
    most_bank_bytes: int
    kernel: str
    lossy: tuple[str, ...]
    page_cache: bool
    peak_memory_bytes: int
    passes: list[Pass]


def run_in_child(point: Point, *, cgroup_bytes: int | None, progress: ShareProgress) -> PointRun:
    """`run_point` in a fresh process, in a memory cgroup of that size if there is one; raises
    what `run_apart` does."""
    run = run_apart(run_point_as_json, asdict(point), cgroup_bytes=cgroup_bytes, progress=progress)
    return PointRun(**{**run, "passes": [Pass(**taken) for taken in run["passes"]]})


def run_point_as_json(point: dict[str, Any], progress: ShareProgress) -> dict[str, Any]:
    return asdict(run_point(Point(**point), progress))


def run_point(point: Point, progress: ShareProgress = lambda share: None) -> PointRun:
    """Run a point in this process; `progress` is told which share of it is done.

    Raises what loading and answering raise.
    """
    options = Options(**point.options)
    with FlashMoEModel(open_store(point.store), options) as model:
        runner = _Runner(model, point, progress)
        passes = [runner.run(number) for number in range(len(point.passes))]
        return PointRun(
            bank_bytes=model.bank_bytes,
            most_bank_bytes=model.memory_plan.most_bank_bytes,
            kernel=resolve_kernel(options.kernel),
            lossy=model.lossy,
            page_cache=model.page_cache,
            peak_memory_bytes=machine.peak_resident_set_bytes(),
            passes=passes,
        )


class _Runner:
    """Answers prompts with one model."""

    def __init__(self, model: FlashMoEModel, point: Point, progress: ShareProgress) -> None:
        self._model = model
        self._point = point
        self._progress = progress

    def say(self, n_passes: int, share: float) -> None:
        """Report `n_passes` whole passes and a share of the next one."""
        self._progress((n_passes + min(share, 1.0)) / len(self._point.passes))

    def run(self, number: int) -> Pass:
        """One pass. Raises FlashMoEError when no answer has two tokens."""
        point = self._point
        taken = Pass(point.passes[number])

        def say() -> None:
            done = asked + len(taken.answers[-1]) / point.max_tokens
            self.say(number, done / len(point.prompts))

        asked = 0
        while asked < len(point.prompts) or len(taken.token_seconds) < point.max_tokens:
            if asked == len(point.prompts) and not taken.token_seconds:
                raise FlashMoEError(
                    "no answer has a second token, so nothing is decoded: give other prompts"
                )
            self._answer(taken, asked, say)
            asked += 1
        return taken

    def _answer(self, taken: Pass, asked: int, say: Callable[[], None]) -> None:
        """Answer one prompt, adding to `taken`; `say` is called after each token."""
        point = self._point
        number = asked % len(point.prompts)
        last = time.perf_counter()
        session = self._model.session()
        try:
            ids = encode_prompt(
                self._model.tokenizer, point.prompts[number], template=point.template
            )
            stream = session.stream(
                ids,
                max_new_tokens=point.max_tokens,
                sampling=Sampling(point.temperature, seed=asked),
            )
        except PromptError as error:
            raise PromptError(f"prompt {number + 1}: {error}") from error
        answer: list[int] = []
        taken.answers.append(answer)
        for piece in stream:
            now = time.perf_counter()
            if not answer:
                taken.first_token_seconds.append(now - last)
                first = copy.deepcopy(piece.report)
                taken.prompt_tokens.append(first.prompt_tokens)
                taken.prefill_seconds.append(first.seconds.prefill)
            elif piece.token is not None:
                taken.token_seconds.append(now - last)
            if piece.token is None:
                break
            answer.append(piece.token)
            say()
            last = time.perf_counter()
        taken.add(first, piece.report)
        if len(answer) > 1:
            taken.computing_seconds += self._repeat(session, answer[-1])

    def _repeat(self, session: Session, token: int) -> Iterator[float]:
        """Seconds of feeding one more token again and again, waiting for reads left out.

        Its experts are in the bank from the time before. None where the context has no place.
        """
        fed = [*session.mark(), token]
        if len(fed) > self._model.context:
            return
        for number in range(1 + REPEATS):
            report = Answer.of(session.stream(fed, max_new_tokens=1)).report
            if report.fed_tokens != 1:
                return
            if number:
                seconds = report.seconds
                yield seconds.prefill + seconds.decode - seconds.phases.reading
