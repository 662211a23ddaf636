"""The public Python API: a model that answers, and who may use it.

Knows that a run is decided and then built; every rule about bytes, slots, kernels or tokens lives
further down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.nn as nn
import numpy.typing as npt

from flashmoe.base import machine
from flashmoe.base.errors import FlashMoEError
from flashmoe.base.progress import Progress
from flashmoe.checkpoint.source import resolve
from flashmoe.checkpoint.tokenizer import load_tokenizer
from flashmoe.demo import DEMO_FOLDER
from flashmoe.engine.build import RunningModel
from flashmoe.engine.decide import decide
from flashmoe.engine.facts import MachineFacts, ModelFacts
from flashmoe.engine.model_cache import cache_folder, lock_folder, open_model
from flashmoe.engine.options import Options
from flashmoe.engine.plan import RunPlan
from flashmoe.generation.prompt import Prompt
from flashmoe.generation.report import Ledger, Report
from flashmoe.generation.session import DEFAULT_MAX_TOKENS, Answer, Piece, Sampling, Session
from flashmoe.generation.turns import GivenUp, Turns
from flashmoe.memory.budget import MemoryPlan
from flashmoe.model.load import StreamingModel
from flashmoe.probe.tuning import TuningFile
from flashmoe.repacking.recipe import Recipe
from flashmoe.repacking.repack import plan_store
from flashmoe.store.claim import claim
from flashmoe.store.reader import Store, is_incomplete, is_store, open_store

# Of a tokenizer that is not loaded: what one of 248,320 tokens was measured to take for each.
TOKENIZER_TOKEN_BYTES = 340


def plan_run(
    source: str | Path | Store | None = None, options: Options | None = None, **named: Any
) -> RunPlan:
    """What a run would be on this machine and in this process.

    `source` is a store, whose tokenizer is loaded because its memory counts; or a checkpoint (a
    folder or a Hub id, of which headers are read) as `flashmoe.repack` would store it by default;
    None is the demo model. The plan says itself
    whether it fits. Raises SourceError, StoreError, OptionError, or MemoryBudgetError for a bank
    below one token's needs.
    """
    options = replace(options or Options(), **named)
    if isinstance(source, Store):
        return _plan(source, options)[0]
    folder = Path(DEMO_FOLDER if source is None else source).expanduser()
    if is_store(folder) or is_incomplete(folder):
        return _plan(open_store(folder), options)[0]
    checkpoint = resolve(folder if source is None else source)
    facts = ModelFacts.of_plan(*plan_store(checkpoint))
    here = MachineFacts.here()
    process_bytes = here.process_bytes + facts.vocabulary * TOKENIZER_TOKEN_BYTES
    return decide(facts, options, replace(here, process_bytes=process_bytes))


def _plan(store: Store, options: Options) -> tuple[RunPlan, Any]:
    """The plan, and the tokenizer that was loaded for it."""
    facts = ModelFacts.of_store(store)
    tokenizer = _tokenizer(store.path, facts)
    tuning = TuningFile(cache_folder(), store).read() if options.tuned else None
    here = MachineFacts.here(store.file(facts.layers[0].file))
    return decide(facts, options, here, tuning.choice if tuning else None), tokenizer


def _tokenizer(folder: Path, facts: ModelFacts) -> Any:
    return load_tokenizer(folder, facts.config.get("eos_token_id"), facts.vocabulary)


class FlashMoEModel:
    """A mixture-of-experts model whose routed experts are read from disk as they are needed.

    Any thread may call it: answers take turns, first come first served. Attributes: `model` the
    mlx-lm module (`model.model(tokens[None])` gives logits, within `turn()`), `tokenizer`
    mlx-lm's wrapper, `store` the open store, `plan` what was decided before loading (context,
    kernel, reader, page cache, and where each byte goes), `lossy` what makes its output differ
    from the model's, in words, nothing by default.
    """

    def __init__(self, store: Store, options: Options | None = None, **named: Any) -> None:
        """Load an open store, as `options` or options by name say; raises as `from_pretrained`."""
        options = replace(options or Options(), **named)
        self._turns = Turns()
        self._claim = claim(store, lock_folder(), share=options.share)
        try:
            self.plan, self.tokenizer = _plan(store, options)
            self.plan.check()
            self._running = RunningModel(self.plan, store)
        except BaseException:
            self._claim.release()
            raise
        self.store = store
        self._ledger = Ledger(self._running.meter)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path | Store | None = None,
        options: Options | None = None,
        *,
        bits: int | None = None,
        group_size: int | None = None,
        resident_bits: int | None = None,
        method: str | None = None,
        recipe: str | Path | Recipe | None = None,
        revision: str | None = None,
        progress: Progress | None = None,
        **named: Any,
    ) -> FlashMoEModel:
        """Load a store, a checkpoint folder or a Hub id; None means the bundled demo model.

        A store may be given as its path or as what `flashmoe.repack` returned. Checkpoints are
        repacked on first use into ~/.cache/flashmoe (`bits`, `group_size`, `resident_bits`,
        `method`, `recipe`, `revision` and `progress` as in `flashmoe.repack`). The engine's
        options are those of `flashmoe.Options`, as a whole or by name:
        `from_pretrained(path, memory="24GB")`.

        Raises SourceError, StoreError, StoreInUseError, OptionError, or MemoryBudgetError naming
        the least that would fit.
        """
        options = replace(options or Options(), **named)
        store = open_model(
            path_or_id.path if isinstance(path_or_id, Store) else path_or_id,
            bits=bits,
            group_size=group_size,
            resident_bits=resident_bits,
            method=method,
            recipe=recipe,
            revision=revision,
            progress=progress,
        )
        return cls(store, options)

    @property
    def model(self) -> nn.Module:
        """The mlx-lm module; raises FlashMoEError after `close`."""
        return self._streaming().module

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.plan.context

    @property
    def memory_plan(self) -> MemoryPlan:
        """Where each byte goes, as planned."""
        return self.plan.memory

    @property
    def reader(self) -> str:
        """The name of the reader of single tokens' records."""
        return self.plan.reader

    @property
    def page_cache(self) -> bool:
        """Whether records are read through the operating system's page cache."""
        return self.plan.page_cache

    @property
    def lossy(self) -> tuple[str, ...]:
        """What makes the output differ from the model's, in words."""
        return self.plan.lossy

    @property
    def bank_bytes(self) -> int:
        """Memory of all slots, as it is now."""
        governor = self._running.governor
        return self.plan.memory.bank_bytes if governor is None else governor.bank_bytes

    def session(self) -> Session:
        """A conversation that keeps its KV cache between turns."""
        governor = self._running.governor
        return Session(
            self.model,
            self.tokenizer,
            self._ledger,
            context=self.plan.context,
            chunk=self.plan.memory.prompts.chunk_tokens,
            before_step=governor.before_step if governor else None,
            turns=self._turns,
        )

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = DEFAULT_MAX_TOKENS,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        system: str | None = None,
        template: bool = True,
        progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Piece]:
        """Generate piece by piece: `for piece in model.stream("..."): print(piece.text)`.

        `prompt` is a text (a user message when the model has a chat template and `template` is
        true), a list of token ids or a list of chat messages. Temperature 0 is greedy. The
        pieces have the answer's `report`. Once `should_stop` returns true, be it while the call
        waits for its turn, the answer ends with the reason "interrupt".
        """
        return self.session().stream(
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_p, top_k, min_p, seed),
            system=system,
            template=template,
            progress=progress,
            should_stop=should_stop,
        )

    def answer(
        self, prompt: Prompt, max_new_tokens: int = DEFAULT_MAX_TOKENS, **options: Any
    ) -> Answer:
        """The whole answer with its tokens and figures; options as in `stream`."""
        return Answer.of(self.stream(prompt, max_new_tokens, **options))

    def generate(
        self, prompt: Prompt, max_new_tokens: int = DEFAULT_MAX_TOKENS, **options: Any
    ) -> str:
        """The whole answer as text; options as in `stream`."""
        return self.answer(prompt, max_new_tokens, **options).text

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other thread runs the model, and keep others waiting: for calls of
        `model` itself. Raises FlashMoEError after `close`."""
        try:
            turn = self._turns.take()
        except GivenUp:
            raise FlashMoEError(
                "the model was closed while this call waited for its turn"
            ) from None
        with turn, turn.step():
            yield

    def totals(self) -> Report:
        """The sum of the figures of all answers since the model was loaded."""
        return self._ledger.totals()

    def observe_routing(self, observer: Callable[[int, npt.NDArray[Any]], None] | None) -> None:
        """Have `observer(layer, experts)` called for every call of an MoE layer, None for nobody.

        `layer` counts MoE layers from 0, `experts` [..., top_k] is what the router chose.
        Raises FlashMoEError after `close`.
        """
        self._streaming().watch.routed = observer

    def check_integrity(self) -> None:
        """Raise FlashMoEError when a bank's bookkeeping contradicts itself."""
        streaming = self._running.streaming
        for bank in streaming.banks if streaming else ():
            bank.check_integrity()

    def close(self, *, cancel: bool = False) -> None:
        """Give back files, threads and memory; closing twice is fine.

        Other threads' answers, begun or waiting, are finished first; with `cancel` they end at
        their next token or layer, with the reason "interrupt". With `warm_start` it is also when
        the banks' experts are remembered, once some were used.
        """
        self._turns.close(cancel=cancel)
        self._running.close()
        machine.release_freed_memory()
        self._claim.release()

    def _streaming(self) -> StreamingModel:
        self._turns.check_open()
        if self._running.streaming is None:
            raise FlashMoEError("the model is closed; load it again with from_pretrained")
        return self._running.streaming

    def __enter__(self) -> FlashMoEModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None and not issubclass(kind, KeyboardInterrupt):
            self._running.forget_banks()
        self.close()
