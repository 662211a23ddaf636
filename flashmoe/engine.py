"""The one place that wires everything together; the public Python API.

Knows which parts make a running model; every rule about bytes, slots, kernels or tokens lives
further down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy.typing as npt

from flashmoe import machine
from flashmoe.checkpoint.architecture import probe_routing
from flashmoe.checkpoint.caches import cache_bytes
from flashmoe.checkpoint.config import largest, read_config
from flashmoe.checkpoint.tokenizer import load_tokenizer
from flashmoe.errors import FlashMoEError, OptionError
from flashmoe.generation.prompt import Prompt
from flashmoe.generation.session import DEFAULT_MAX_TOKENS, Piece, Sampling, Session
from flashmoe.io.reader import Reader
from flashmoe.io.select import choose_page_cache, open_reader, resolve_reader
from flashmoe.kernels.select import resolve_kernel, select_kernel, select_prompt_kernel
from flashmoe.locate import cache_folder, open_model
from flashmoe.model.load import (
    StreamingModel,
    build_skeleton,
    load_resident,
    stream_experts,
    use_native_linears,
)
from flashmoe.model.routers import find_forecasters
from flashmoe.repacking.execute import Progress
from flashmoe.store.manifest import Manifest
from flashmoe.store.reader import Store
from flashmoe.streaming import budget
from flashmoe.streaming.policy.select import resolve_policy
from flashmoe.streaming.telemetry import Stats
from flashmoe.units import parse_size

DEFAULT_CONTEXT = 4096
# Of the memory that is free when no number is given.
DEFAULT_MEMORY_SHARE = 0.75


class FlashMoEModel:
    """A mixture-of-experts model whose routed experts are read from disk as they are needed.

    Attributes: `model` the mlx-lm module (`model.model(tokens[None])` gives logits), `tokenizer`
    mlx-lm's wrapper, `store` the open store, `memory_plan` where each byte goes, `reader` and
    `page_cache` how records are read.
    """

    def __init__(
        self,
        store: Store,
        *,
        memory: str | int | None = None,
        cache: str | int | None = None,
        kernel: str = "auto",
        context: int | None = None,
        dtype: str = "auto",
        reader: str = "auto",
        page_cache: bool | None = None,
        forecast: bool = True,
        policy: str = "auto",
    ) -> None:
        """Load an open store; see `from_pretrained` for the options."""
        check_options(
            memory=memory,
            cache=cache,
            kernel=kernel,
            context=context,
            dtype=dtype,
            reader=reader,
            page_cache=page_cache,
            policy=policy,
        )
        chosen = resolve_kernel(kernel)
        config = read_config(store.path)
        widen = _widen(dtype, config)
        # The native kernels read 16-bit scales and weights of float32 arithmetic as they are.
        widen_records = widen and chosen != "cpu"
        probed = probe_routing(config)
        tokenizer = load_tokenizer(store.path, config.get("eos_token_id"), probed.vocabulary)
        skeleton = build_skeleton(store, config)
        context = _context(config, context)
        layouts = [layer.layout for layer in store.manifest.layers]
        demands = budget.layer_demands(layouts, widen_records)
        bank_bytes = _bank_bytes(cache, demands)
        total_bytes = parse_size(memory) if memory is not None else None
        if total_bytes is None and bank_bytes is None:
            total_bytes = machine.resident_set_bytes() + int(
                machine.usable_memory_bytes() * DEFAULT_MEMORY_SHARE
            )
        staging_bytes = budget.all_staging_bytes(layouts, widen_records)

        def scratch(chunk: int, swept: bool) -> int:
            return staging_bytes + budget.scratch_bytes(
                chunk=chunk,
                context=context,
                width=probed.width,
                heads=largest(config, "num_attention_heads"),
                vocabulary=probed.vocabulary,
                top_k=max(layout.top_k for layout in layouts),
                materialized_scores=mx.default_device() == mx.cpu,
                swept=swept,
            )

        self.memory_plan = budget.plan_memory(
            total_bytes=total_bytes,
            bank_bytes=bank_bytes,
            process_bytes=machine.resident_set_bytes() + budget.SLACK_BYTES,
            resident_bytes=budget.resident_bytes(store.manifest, widen),
            kv_bytes=_kv_bytes(probed.caches, context, store.manifest, widen),
            prompts=budget.prompt_plans(
                scratch,
                context=context,
                group_bytes=budget.group_bytes(layouts, widen_records),
                most_records=max(layout.n_experts for layout in layouts),
            ),
            demands=demands,
        )
        self.reader = resolve_reader(reader)
        self.page_cache = choose_page_cache(
            page_cache,
            self.reader,
            store.file(store.manifest.layers[0].layout.file),
            file_bytes=store.manifest.streamed_bytes,
            free_bytes=machine.usable_memory_bytes()
            - (self.memory_plan.planned_bytes - self.memory_plan.process_bytes),
        )
        mx.set_cache_limit(self.memory_plan.reuse_bytes)
        load_resident(skeleton, store, widen)
        if chosen == "cpu":
            use_native_linears(skeleton)
        self.store = store
        self.tokenizer = tokenizer
        self.context = context
        self._stats = Stats()
        self._reader: Reader | None = open_reader(self.reader, page_cache=self.page_cache)
        self._streaming: StreamingModel | None = stream_experts(
            skeleton,
            store,
            slots=self.memory_plan.slots,
            group_records=self.memory_plan.prompts.group_records,
            reader=self._reader,
            kernel=select_kernel(chosen, cache_folder()),
            prompt_kernel=select_prompt_kernel(chosen),
            stats=self._stats,
            widen=widen_records,
            policy=policy,
        )
        # Finding routers takes up to a second: not where nothing could be read ahead.
        if forecast and self._streaming.reads_ahead:
            self._streaming.foresee(find_forecasters(skeleton, config))

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path | Store | None = None,
        *,
        memory: str | int | None = None,
        cache: str | int | None = None,
        kernel: str = "auto",
        context: int | None = None,
        dtype: str = "auto",
        reader: str = "auto",
        page_cache: bool | None = None,
        forecast: bool = True,
        policy: str = "auto",
        bits: int | None = None,
        group_size: int | None = None,
        resident_bits: int | None = None,
        revision: str | None = None,
        progress: Progress | None = None,
    ) -> FlashMoEModel:
        """Load a store, a checkpoint folder or a Hub id; None means the bundled demo model.

        A store may be given as its path or as what `flashmoe.repack` returned.

        Checkpoints are repacked on first use into ~/.cache/flashmoe (`bits`, `group_size`,
        `resident_bits`, `revision` and `progress` as in `flashmoe.repack`).

        memory: one number for the whole process ("24GB", or bytes); by default three quarters
            of what the machine has free. cache: the bank alone, "min" being one token's needs.
        kernel: "auto", "cpu", "metal" or "reference". context: most tokens of prompt and answer
            together (default 4096, or the model's own limit where that is lower).
        dtype: "float32" widens 16-bit floats when they are loaded, "stored" keeps them;
            "auto" widens on CPUs, where MLX is several times faster in float32, and wherever the
            model's config states float32.
        reader: "pread", "mmap", or "auto", which means pread: by the native library where it
            was built, otherwise by Python threads.
        page_cache: whether records are read through the operating system's page cache; by
            default unless all of them do not fit into the memory that is left beside the process.
        forecast: whether to guess each layer's experts from the layer before and read them ahead,
            where that turns out to pay.
        policy: which expert gives way to one that is read: "lru", "clock", "slru", "s3fifo", "lfu",
            or "auto", which is "lfu": it missed least on held-out prompts.

        Raises SourceError, StoreError, OptionError, or MemoryBudgetError naming the least that
        would fit.
        """
        check_options(
            memory=memory,
            cache=cache,
            kernel=kernel,
            context=context,
            dtype=dtype,
            reader=reader,
            page_cache=page_cache,
            policy=policy,
        )
        store = open_model(
            path_or_id.path if isinstance(path_or_id, Store) else path_or_id,
            bits=bits,
            group_size=group_size,
            resident_bits=resident_bits,
            revision=revision,
            progress=progress,
        )
        return cls(
            store,
            memory=memory,
            cache=cache,
            kernel=kernel,
            context=context,
            dtype=dtype,
            reader=reader,
            page_cache=page_cache,
            forecast=forecast,
            policy=policy,
        )

    @property
    def model(self) -> nn.Module:
        """The mlx-lm module; raises FlashMoEError after `close`."""
        return self._running().module

    @property
    def bank_bytes(self) -> int:
        """Memory of all slots."""
        return self.memory_plan.bank_bytes

    def session(self) -> Session:
        """A conversation that keeps its KV cache between turns."""
        return Session(
            self.model,
            self.tokenizer,
            self._stats,
            context=self.context,
            chunk=self.memory_plan.prompts.chunk_tokens,
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
        """Give back files, threads and memory; closing twice is fine."""
        if self._reader is not None:
            self._reader.close()
        if self._streaming is not None:
            self._streaming.close()
        self._reader = None
        self._streaming = None

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
        self.close()


def check_options(
    *,
    memory: str | int | None,
    cache: str | int | None,
    kernel: str,
    context: int | None,
    dtype: str = "auto",
    reader: str = "auto",
    page_cache: bool | None = None,
    policy: str = "auto",
) -> None:
    """Raise OptionError for a value that is wrong for every model, before one is fetched."""
    if memory is not None:
        parse_size(memory)
    if cache is not None and cache != "min":
        parse_size(cache)
    resolve_kernel(kernel)
    resolve_reader(reader, page_cache)
    resolve_policy(policy)
    if context is not None and context < 1:
        raise OptionError(f"context must be at least 1 token, not {context}")
    if dtype not in ("auto", "float32", "stored"):
        raise OptionError(f"dtype must be auto, float32 or stored, not {dtype!r}")


def _widen(dtype: str, config: dict[str, Any]) -> bool:
    if dtype == "auto":
        stated = config.get("dtype", config.get("torch_dtype"))
        return stated == "float32" or mx.default_device() == mx.cpu
    return dtype == "float32"


def _context(config: dict[str, Any], context: int | None) -> int:
    most = largest(config, "max_position_embeddings")
    if context is None:
        return min(DEFAULT_CONTEXT, most) if most else DEFAULT_CONTEXT
    if most and context > most:
        raise OptionError(f"context {context} exceeds the {most} tokens the model was made for")
    return context


def _kv_bytes(caches: list[Any], context: int, manifest: Manifest, widen: bool) -> int:
    """The probe's caches are float32; what runs has 16-bit ones where activations are 16-bit."""
    tensors = [tensor.dtype for shard in manifest.resident for tensor in shard.tensors]
    narrow = not widen and ("BF16" in tensors or "F16" in tensors) and "F32" not in tensors
    return cache_bytes(caches, context) // (2 if narrow else 1)


def _bank_bytes(cache: str | int | None, demands: list[budget.LayerDemand]) -> int | None:
    if cache is None:
        return None
    return budget.least_bank_bytes(demands) if cache == "min" else parse_size(cache)
