"""What a run is decided from: the sizes of a model, and what this machine has.

Gathered here, before `decide`, which looks at nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from flashmoe.base import machine
from flashmoe.checkpoint.architecture import Routing, probe_routing
from flashmoe.checkpoint.config import Config, largest, read_config
from flashmoe.checkpoint.kv_memory import CacheSizes, cache_sizes
from flashmoe.checkpoint.top_k import with_experts_per_token
from flashmoe.io.files import uncached_problem
from flashmoe.io.select import reader_statuses
from flashmoe.kernels.select import missing_kernels
from flashmoe.model.attention_probe import ScoresProbe
from flashmoe.repacking.plan import RepackPlan
from flashmoe.store.layout import LayerLayout, TensorSpec, Unit
from flashmoe.store.reader import Store


@dataclass(frozen=True)
class ModelFacts:
    """Sizes and config of a model, from its store or from a plan of one.

    `layers` are the streamed layers, `resident` every other tensor, `caches` what each layer
    keeps of tokens (float32). `width` is the widest input of an expert, `holds_scores` says
    whether attention may hold the scores of all heads at once even in the native library.
    `trained_top_k` is the most experts per token that the model was trained with.
    """

    config: Config
    layers: tuple[LayerLayout, ...]
    resident: tuple[TensorSpec, ...]
    caches: CacheSizes
    width: int
    vocabulary: int
    holds_scores: bool
    trained_top_k: int
    routing: Routing = field(repr=False, compare=False)

    @classmethod
    def of_store(cls, store: Store) -> ModelFacts:
        """Raises SourceError when mlx-lm cannot build the model of the store's config."""
        layers = tuple(layer.layout for layer in store.manifest.layers)
        resident = (tensor for shard in store.manifest.resident for tensor in shard.tensors)
        return cls._probed(read_config(store.path), layers, tuple(resident))

    @classmethod
    def of_plan(cls, plan: RepackPlan, config: Config) -> ModelFacts:
        """Those of a store that nobody has written; raises as `of_store`."""
        resident = (tensor for shard in plan.resident for tensor in shard.tensors)
        return cls._probed(config, plan.layers, tuple(resident))

    @classmethod
    def _probed(
        cls, config: Config, layers: tuple[LayerLayout, ...], resident: tuple[TensorSpec, ...]
    ) -> ModelFacts:
        scores = ScoresProbe()
        routing = probe_routing(config, scores.watch)
        return cls(
            config=config,
            layers=layers,
            resident=resident,
            caches=cache_sizes(routing.caches),
            width=routing.width,
            vocabulary=routing.vocabulary,
            holds_scores=not scores.are_never_held(routing.caches),
            trained_top_k=max(routing.top_k.values()),
            routing=routing,
        )

    def with_experts_per_token(self, count: int) -> ModelFacts:
        """The same model with fewer experts per token; raises OptionError where that cannot be."""
        config, routing = with_experts_per_token(self.config, count, self.routing)
        return replace(
            self,
            config=config,
            routing=routing,
            layers=tuple(replace(layer, top_k=count) for layer in self.layers),
        )

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """What each layer streams."""
        return tuple(layer.unit for layer in self.layers)

    @cached_property
    def streamed_bytes(self) -> int:
        """Bytes of all records."""
        return sum(unit.nbytes for unit in self.units)

    @cached_property
    def heads(self) -> int:
        """Attention heads, of the layer with most."""
        return largest(self.config, "num_attention_heads")


@dataclass(frozen=True)
class MachineFacts:
    """What a run can use: memory in bytes, and what can run here.

    `process_bytes` is what this process has now, `usable_bytes` what the machine could still
    give it. `missing_kernels` says of each kernel why it cannot run, None when it can.
    `uncached_problem` says why the store's file system reads only through the page cache, None
    when it can do without. `on_cpu` is where MLX computes.
    """

    process_bytes: int
    usable_bytes: int
    on_cpu: bool
    missing_kernels: Mapping[str, str | None]
    reader_notes: Mapping[str, str]
    uncached_problem: str | None

    @classmethod
    def here(cls, record_file: Path | None = None) -> MachineFacts:
        """This machine, process and the file system of a store's record file.

        Raises ReadError when the file cannot be opened.
        """
        return cls(
            process_bytes=machine.resident_set_bytes(),
            usable_bytes=machine.usable_memory_bytes(),
            on_cpu=mx.default_device() == mx.cpu,
            missing_kernels=missing_kernels(),
            reader_notes={status.name: status.note for status in reader_statuses()},
            uncached_problem=None if record_file is None else uncached_problem(record_file),
        )
