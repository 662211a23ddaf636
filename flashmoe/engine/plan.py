"""The plan of a run: everything that is decided before anything is loaded, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from flashmoe.base.errors import MemoryBudgetError
from flashmoe.base.units import format_size
from flashmoe.checkpoint.kv_memory import cache_bytes
from flashmoe.engine.facts import ModelFacts
from flashmoe.engine.options import Options
from flashmoe.memory import budget
from flashmoe.model.routing_sites import Site
from flashmoe.probe.tuning import Reads


@dataclass(frozen=True)
class Needs:
    """What a model takes beside its bank, for any number of tokens.

    `widen` and `widen_records`: whether 16-bit floats of resident weights and of records become
    float32; `holds_scores`: whether attention holds the scores of all keys at once.
    """

    facts: ModelFacts
    widen: bool
    widen_records: bool
    holds_scores: bool

    @cached_property
    def demands(self) -> list[budget.LayerDemand]:
        """What the layers' banks may be made of."""
        return budget.layer_demands(self.facts.units, self.widen_records)

    def kv_bytes(self, tokens: int, *, filled: bool = False) -> int:
        """The caches of all layers; see `CacheArray.bytes_at`."""
        return cache_bytes(self.facts.caches, tokens, filled=filled) // self._narrowing

    def largest_kv_bytes(self, tokens: int) -> int:
        """The cache of the layer with the largest one."""
        layers = self.facts.caches
        return max(cache_bytes((layer,), tokens) for layer in layers) // self._narrowing

    def scratch_bytes(self, chunk: int, context: int, *, staged: bool) -> int:
        """What feeding `chunk` tokens takes on top, with `context` tokens in the caches then."""
        return budget.scratch_bytes(
            chunk=chunk,
            context=context,
            width=self.facts.width,
            heads=self.facts.heads,
            vocabulary=self.facts.vocabulary,
            top_k=max(unit.step_records for unit in self.facts.units),
            held_scores=self.holds_scores,
            staged=staged,
        )

    @cached_property
    def _narrowing(self) -> int:
        """The probe's caches are float32; what runs has 16-bit ones where activations are."""
        dtypes = {tensor.dtype for tensor in self.facts.resident}
        narrow = bool(dtypes & {"BF16", "F16"}) and "F32" not in dtypes
        return 2 if narrow and not self.widen else 1


@dataclass(frozen=True)
class RunPlan:
    """What a run will be; `decide` makes it, `build` acts on it and decides nothing.

    `memory` has every byte and the slots of each layer's bank. `kernel`, `reader` and
    `page_cache` come with the reason for them. `native_attention` says whether attention goes
    through the native library, `prefetch` whether to prefetch where that pays. `steerable` are
    the routers that a route bias changes. `lossy` says in words what makes the output differ
    from the model's own; nothing by default. `found_bytes` is the memory that the process had
    and could have had.
    """

    options: Options
    needs: Needs
    context: int
    kernel: str
    kernel_reason: str
    reader: str
    reader_reason: str
    page_cache: bool
    page_cache_reason: str
    reads: Reads
    native_attention: bool
    prefetch: bool
    steerable: tuple[Site, ...]
    memory: budget.MemoryPlan
    found_bytes: int
    lossy: tuple[str, ...]

    @property
    def facts(self) -> ModelFacts:
        """The model that runs, with the experts per token that it runs with."""
        return self.needs.facts

    @property
    def governed(self) -> bool:
        """Whether banks are resized while the model runs: one of a given size keeps it."""
        return self.memory.total_bytes is not None and self.options.cache is None

    @property
    def fits(self) -> bool:
        """Whether the run stays below its number."""
        return self.memory.fits

    def check(self) -> None:
        """Raise MemoryBudgetError, naming the least that would fit, when this does not fit."""
        try:
            self.memory.check()
        except MemoryBudgetError as error:
            if self.options.prefill_chunk is None:
                raise
            raise MemoryBudgetError(
                f"{error}, or take a prefill chunk of fewer tokens than "
                f"{self.options.prefill_chunk}",
                error.least_bytes,
            ) from None

    def rows(self) -> list[tuple[str, int, str]]:
        """What memory is for, its bytes, and a note, in the order in which it is given out."""
        memory, layers = self.memory, self.facts.layers
        fewest, most = min(memory.slots), max(memory.slots)
        slots = str(most) if fewest == most else f"{fewest} to {most}"
        experts = max(layer.n_experts for layer in layers)
        bank = f"{slots} of {experts} experts in each of {len(layers)} layers"
        if memory.lent_bytes:
            bank += f", {format_size(memory.lent_bytes)} of it lent by the KV cache"
        prompts = memory.prompts
        staging = "prompts go through the bank"
        if prompts.group_records:
            staging = f"two groups of {prompts.group_records} records"
        return [
            ("process", memory.process_bytes, "Python, MLX and the tokenizer"),
            ("resident weights", memory.resident_bytes, self._widening),
            ("KV cache", memory.kv_bytes, f"{self.context} tokens"),
            ("scratch", prompts.scratch_bytes, f"prefill chunk of {prompts.chunk_tokens} tokens"),
            ("staging", prompts.staging_bytes, staging),
            ("MLX cache limit", memory.mlx_cache_bytes, "freed memory that MLX may keep"),
            ("bank", memory.bank_bytes, bank),
        ]

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data: bytes, slots per layer and choices with their reasons."""
        memory = asdict(self.memory)
        memory["prefill"] = memory.pop("prompts")
        return {
            "fits": self.fits,
            "least_memory_bytes": self.memory.least_total_bytes,
            "context": self.context,
            "kernel": {"name": self.kernel, "reason": self.kernel_reason},
            "reader": {"name": self.reader, "reason": self.reader_reason},
            "page_cache": {"on": self.page_cache, "reason": self.page_cache_reason},
            "reads": asdict(self.reads),
            "prefetch": self.prefetch,
            "memory": {**memory, "planned_bytes": self.memory.planned_bytes},
            "lossy": list(self.lossy),
        }

    def with_slots(self, slots: tuple[int, ...]) -> RunPlan:
        """The same plan with other banks, as the governor has made them."""
        pairs = zip(slots, self.needs.demands, strict=True)
        bank_bytes = sum(n * demand.slot_bytes for n, demand in pairs)
        return replace(self, memory=replace(self.memory, slots=slots, bank_bytes=bank_bytes))

    @property
    def _widening(self) -> str:
        return "16-bit floats widened to float32" if self.needs.widen else "as stored"
