"""The one place that wires everything together; the public Python API.

Knows which parts make a running model; every rule about bytes, slots, kernels or tokens lives
further down.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy.typing as npt

from flashmoe.bank.stats import Stats
from flashmoe.bank.warm_start_file import WarmStartFile
from flashmoe.base import machine
from flashmoe.base.errors import FlashMoEError
from flashmoe.checkpoint.architecture import probe_routing
from flashmoe.checkpoint.config import read_config
from flashmoe.checkpoint.tokenizer import load_tokenizer
from flashmoe.checkpoint.top_k import with_experts_per_token
from flashmoe.engine.model_cache import cache_folder, lock_folder, open_model
from flashmoe.engine.needs import (
    Needs,
    choose_context,
    choose_widening,
    govern,
    plan_model,
)
from flashmoe.engine.options import Options
from flashmoe.generation.prompt import Prompt
from flashmoe.generation.session import DEFAULT_MAX_TOKENS, Piece, Sampling, Session
from flashmoe.io.reader import Reader
from flashmoe.io.select import choose_page_cache, open_reader, resolve_reader
from flashmoe.kernels.select import resolve_kernel, select_kernel, select_prompt_kernel
from flashmoe.memory.governor import Governor
from flashmoe.model.attention_probe import ScoresProbe
from flashmoe.model.load import (
    StreamingModel,
    build_skeleton,
    load_resident,
    stream_experts,
    use_native_attention,
    use_native_linears,
)
from flashmoe.model.predictor import find_predictors
from flashmoe.model.route_bias import find_steerable, prefer_resident
from flashmoe.probe.tuning import Choice, Reads, TuningFile
from flashmoe.repacking.recipe import Recipe
from flashmoe.repacking.repack import Progress
from flashmoe.store.claim import claim
from flashmoe.store.reader import Store

WARM_START_FOLDER = "warm-start"
# MLX waits for its own threads with Python's lock held when limits are set, and reserving a bank
# has such a thread call Python: one model at a time.
_LOADING = threading.Lock()


class FlashMoEModel:
    """A mixture-of-experts model whose routed experts are read from disk as they are needed.

    Attributes: `model` the mlx-lm module (`model.model(tokens[None])` gives logits), `tokenizer`
    mlx-lm's wrapper, `store` the open store, `memory_plan` where each byte goes, `reader` and
    `page_cache` how records are read, `choice` what `flashmoe tune` stored or the defaults, `lossy`
    what makes its output differ from the model's, in words, nothing by default.
    """

    def __init__(
        self,
        store: Store,
        options: Options | None = None,
        **named: Any,
    ) -> None:
        """Load an open store, as `options` or options by name say; raises as `from_pretrained`."""
        options = replace(options or Options(), **named)
        self._reader: Reader | None = None
        self._prefill_reader: Reader | None = None
        self._streaming: StreamingModel | None = None
        self._governor: Governor | None = None
        self._warm_start_file: WarmStartFile | None = None
        self._claim = claim(store, lock_folder(), share=options.share)
        try:
            with _LOADING:
                self._load(store, options)
        except BaseException:
            self._warm_start_file = None
            self.close()
            raise

    def _load(self, store: Store, options: Options) -> None:
        kernel = resolve_kernel(options.kernel)
        found_bytes = machine.resident_set_bytes() + machine.usable_memory_bytes()
        config = read_config(store.path)
        widen = choose_widening(config, options.dtype)
        # The native kernels read 16-bit scales and weights of float32 arithmetic as they are.
        widen_records = widen and kernel != "cpu"
        native_attention = kernel == "cpu" and mx.default_device() == mx.cpu
        scores = ScoresProbe()
        probed = probe_routing(config, scores.watch if native_attention else None)
        self.lossy: tuple[str, ...] = ()
        if options.experts_per_token is not None:
            count = options.experts_per_token
            trained = max(probed.top_k.values())
            config, probed = with_experts_per_token(config, count, probed)
            store = replace(store, manifest=store.manifest.with_top_k(count))
            if count < trained:
                self.lossy = (f"{count} of {trained} experts per token",)
        steerable = find_steerable(config) if options.route_bias else ()
        tokenizer = load_tokenizer(store.path, config.get("eos_token_id"), probed.vocabulary)
        skeleton = build_skeleton(store, config)
        self.context = choose_context(config, options.context)
        needs = Needs(
            store.manifest,
            config,
            probed,
            self.context,
            widen,
            widen_records,
            # The library attends in float32 alone; MLX's own attention is fused on GPUs.
            held_scores=mx.default_device() == mx.cpu
            and not (native_attention and widen and scores.are_never_held(probed.caches)),
        )
        plan = plan_model(needs, options)
        self.memory_plan = plan
        self.page_cache = choose_page_cache(
            options.page_cache,
            options.reader,
            store.file(store.manifest.layers[0].layout.file),
            file_bytes=store.manifest.streamed_bytes,
            free_bytes=machine.usable_memory_bytes() - (plan.planned_bytes - plan.process_bytes),
        )
        tuning = TuningFile(cache_folder(), store).read() if options.tuned else None
        self.choice = Choice() if tuning is None else tuning.choice
        mx.set_cache_limit(self.memory_plan.reuse_bytes)
        load_resident(skeleton, store, widen)
        self._stats = Stats()
        if kernel == "cpu":
            use_native_linears(skeleton, self._stats.clock)
            if native_attention:
                use_native_attention(skeleton, self._stats.clock)
        self.store = store
        self.tokenizer = tokenizer
        self._open_readers(self.choice.reads(self.page_cache, options.reader))
        assert self._reader is not None
        self._streaming = stream_experts(
            skeleton,
            store,
            slots=self.memory_plan.slots,
            group_records=self.memory_plan.prompts.group_records,
            reader=self._reader,
            kernel=select_kernel(kernel, cache_folder()),
            prompt_kernel=select_prompt_kernel(kernel),
            stats=self._stats,
            widen=widen_records,
            prefill_reader=self._prefill_reader,
        )
        # A bank of a given size keeps it.
        if plan.total_bytes is not None and options.cache is None:
            self._governor = govern(needs, plan, self._streaming, found_bytes=found_bytes)
        # Finding routers takes up to a second: not where nothing could be read ahead.
        if options.prefetch is not False and self._streaming.can_prefetch:
            self._streaming.prefetch_by(find_predictors(skeleton, config))
        # Predictors go on with the routers as they are.
        if steerable:
            prefer_resident(self._streaming, steerable, options.route_bias)
            self.lossy += (f"route bias {options.route_bias:g}",)
        if options.warm_start:
            self._warm_start_file = WarmStartFile(cache_folder() / WARM_START_FOLDER, store)
            self._streaming.warm_start(self._warm_start_file.read() or ())

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
        return self._running().module

    @property
    def bank_bytes(self) -> int:
        """Memory of all slots, as it is now."""
        return self.memory_plan.bank_bytes if self._governor is None else self._governor.bank_bytes

    def session(self) -> Session:
        """A conversation that keeps its KV cache between turns."""
        return Session(
            self.model,
            self.tokenizer,
            self._stats,
            context=self.context,
            chunk=self.memory_plan.prompts.chunk_tokens,
            before_step=self._governor.before_step if self._governor else None,
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
    ) -> Iterator[Piece]:
        """Generate piece by piece: `for piece in model.stream("..."): print(piece.text)`.

        `prompt` is a text (a user message when the model has a chat template and `template` is
        true), a list of token ids or a list of chat messages. Temperature 0 is greedy.
        """
        return self.session().stream(
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_p, top_k, min_p, seed),
            system=system,
            template=template,
            progress=progress,
        )

    def generate(
        self, prompt: Prompt, max_new_tokens: int = DEFAULT_MAX_TOKENS, **options: Any
    ) -> str:
        """The whole answer as text; options as in `stream`."""
        return "".join(piece.text for piece in self.stream(prompt, max_new_tokens, **options))

    def stats(self) -> Stats:
        """A copy of the totals since the model was loaded."""
        return self._stats.copy()

    @property
    def live_stats(self) -> Stats:
        """The totals themselves, which go on counting."""
        return self._stats

    def observe_routing(self, observer: Callable[[int, npt.NDArray[Any]], None] | None) -> None:
        """Have `observer(layer, experts)` called for every call of an MoE layer, None for nobody.

        `layer` counts MoE layers from 0, `experts` [..., top_k] is what the router chose.
        Raises FlashMoEError after `close`.
        """
        for number, layer in enumerate(self._running().layers):
            layer.observer = None if observer is None else partial(observer, number)

    def check_integrity(self) -> None:
        """Raise FlashMoEError when a bank's bookkeeping contradicts itself."""
        for bank in self._streaming.banks if self._streaming else ():
            bank.check_integrity()

    def close(self) -> None:
        """Give back files, threads and memory; closing twice is fine.

        With `warm_start` it is also when the banks' experts are remembered, once some were used.
        """
        if self._streaming is not None:
            self._streaming.stop_prefetch()
            if self._warm_start_file is not None and self._stats.bytes_demanded:
                self._warm_start_file.write([bank.by_value() for bank in self._streaming.banks])
        for reader in (self._reader, self._prefill_reader):
            if reader is not None:
                reader.close()
        if self._streaming is not None:
            self._streaming.close()
        self._reader = self._prefill_reader = None
        self._streaming = None
        self._governor = None
        self._claim.release()

    def _open_readers(self, reads: Reads) -> None:
        self.reader = resolve_reader(reads.decode.reader)
        self._reader = self._prefill_reader = open_reader(reads.decode, page_cache=self.page_cache)
        if resolve_reader(reads.prefill.reader) != self.reader:
            self._prefill_reader = open_reader(reads.prefill, page_cache=self.page_cache)
        elif reads.prefill.depth != reads.decode.depth:
            self._prefill_reader = self._reader.lane(reads.prefill.depth)

    def _running(self) -> StreamingModel:
        if self._streaming is None:
            raise FlashMoEError("the model is closed; load it again with from_pretrained")
        return self._streaming

    def __enter__(self) -> FlashMoEModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None and not issubclass(kind, KeyboardInterrupt):
            # What a run that failed had in its banks is nothing to begin the next one with.
            self._warm_start_file = None
        self.close()
