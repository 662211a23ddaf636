"""What a store's model needs of memory, measured on its config and manifest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from flashmoe.base import machine
from flashmoe.base.errors import MemoryBudgetError, OptionError
from flashmoe.base.units import parse_size
from flashmoe.checkpoint.architecture import Routing
from flashmoe.checkpoint.config import Config, largest
from flashmoe.checkpoint.kv_memory import STEP_TOKENS, cache_bytes
from flashmoe.engine.options import Options
from flashmoe.memory import budget
from flashmoe.memory.balance import Balance
from flashmoe.memory.governor import LOOK_TOKENS, Governor, Limits
from flashmoe.model.load import StreamingModel
from flashmoe.store.layout import LayerLayout
from flashmoe.store.manifest import Manifest

DEFAULT_CONTEXT = 4096
# Of the memory that is free when no number is given.
DEFAULT_MEMORY_SHARE = 0.75


def choose_context(config: Config, context: int | None) -> int:
    """Most tokens of prompt and answer together: what is asked for, or a default that the model
    was made for. Raises OptionError for more than that."""
    most = largest(config, "max_position_embeddings")
    if context is None:
        return min(DEFAULT_CONTEXT, most) if most else DEFAULT_CONTEXT
    if most and context > most:
        raise OptionError(f"context {context} exceeds the {most} tokens the model was made for")
    return context


def choose_widening(config: Config, dtype: str) -> bool:
    """Whether 16-bit floats become float32 when they are loaded."""
    if dtype == "auto":
        stated = config.get("dtype", config.get("torch_dtype"))
        return stated == "float32" or mx.default_device() == mx.cpu
    return dtype == "float32"


@dataclass(frozen=True)
class Needs:
    """What a model takes beside its bank.

    `widen` and `widen_records`: whether resident weights and records become float32;
    `held_scores`: whether attention holds scores for all keys at once.
    """

    manifest: Manifest
    config: Config
    probed: Routing
    context: int
    widen: bool
    widen_records: bool
    held_scores: bool

    @cached_property
    def layouts(self) -> list[LayerLayout]:
        return [layer.layout for layer in self.manifest.layers]

    @cached_property
    def demands(self) -> list[budget.LayerDemand]:
        """What the layers' banks may be made of."""
        return budget.layer_demands(self.layouts, self.widen_records)

    def kv_bytes(self, tokens: int, *, filled: bool = False) -> int:
        """The caches of all layers; see `cache_bytes`."""
        return cache_bytes(self.probed.caches, tokens, filled=filled) // self._narrowing

    def largest_kv_bytes(self, tokens: int) -> int:
        """The cache of the layer with the largest one."""
        caches = self.probed.caches
        return max(cache_bytes([cache], tokens) for cache in caches) // self._narrowing

    def scratch_bytes(self, chunk: int, context: int, *, staged: bool) -> int:
        """What feeding `chunk` tokens takes on top, with `context` tokens in the caches then."""
        return budget.scratch_bytes(
            chunk=chunk,
            context=context,
            width=self.probed.width,
            heads=largest(self.config, "num_attention_heads"),
            vocabulary=self.probed.vocabulary,
            top_k=max(layout.top_k for layout in self.layouts),
            held_scores=self.held_scores,
            staged=staged,
        )

    @cached_property
    def _narrowing(self) -> int:
        """The probe's caches are float32; what runs has 16-bit ones where activations are."""
        tensors = [tensor.dtype for shard in self.manifest.resident for tensor in shard.tensors]
        narrow = ("BF16" in tensors or "F16" in tensors) and "F32" not in tensors
        return 2 if narrow and not self.widen else 1


def plan_model(needs: Needs, options: Options) -> budget.MemoryPlan:
    """Where every byte of a model goes that runs in this process.

    Raises MemoryBudgetError, naming the least that would fit.
    """
    bank_bytes = _bank_bytes(options.cache, needs.demands)
    total_bytes = parse_size(options.memory) if options.memory is not None else None
    if total_bytes is None and bank_bytes is None:
        total_bytes = machine.resident_set_bytes() + int(
            machine.usable_memory_bytes() * DEFAULT_MEMORY_SHARE
        )
    staging_bytes = budget.all_staging_bytes(needs.layouts, needs.widen_records)

    def scratch(chunk: int, staged: bool) -> int:
        return staging_bytes + needs.scratch_bytes(chunk, needs.context, staged=staged)

    kv_bytes = needs.kv_bytes(needs.context)
    try:
        return budget.plan_memory(
            total_bytes=total_bytes,
            bank_bytes=bank_bytes,
            process_bytes=machine.resident_set_bytes() + budget.SLACK_BYTES,
            resident_bytes=budget.resident_bytes(needs.manifest, needs.widen),
            kv_bytes=kv_bytes,
            prompts=budget.prompt_plans(
                scratch,
                context=needs.context,
                group_bytes=budget.group_bytes(needs.layouts, needs.widen_records),
                most_records=max(layout.n_experts for layout in needs.layouts),
                chunk=options.prefill_chunk,
            ),
            demands=needs.demands,
            lendable_bytes=kv_bytes - needs.kv_bytes(1),
        )
    except MemoryBudgetError as error:
        of_bank = bank_bytes is not None and bank_bytes < budget.least_bank_bytes(needs.demands)
        if options.prefill_chunk is None or of_bank:
            raise
        raise MemoryBudgetError(
            f"{error}, or take a prefill chunk of fewer tokens than {options.prefill_chunk}",
            error.least_bytes,
        ) from None


def govern(
    needs: Needs,
    plan: budget.MemoryPlan,
    streaming: StreamingModel,
    *,
    found_bytes: int,
) -> Governor:
    """What keeps a loaded model at the number of its plan.

    `found_bytes`: the memory that this process had and could have had before it was loaded.
    """
    assert plan.total_bytes is not None
    in_place = streaming.resizes_in_place
    staged = plan.prompts.group_records > 0

    def coming(known: int, new: int, held: int) -> int:
        # Where resizing is dear, what prompts need is not lent to the banks between them.
        fed = new if in_place else max(new, plan.prompts.chunk_tokens)
        scratch = needs.scratch_bytes(fed, known + new, staged=staged)
        # As far as the next look.
        tokens = known + new + LOOK_TOKENS
        if needs.kv_bytes(tokens, filled=True) <= held:
            return scratch
        # Behind a part of a step, mlx-lm adds whole ones.
        tokens += STEP_TOKENS - 1
        # A layer's cache exists twice while it grows, and keys and values wait for being written.
        growing = max(needs.kv_bytes(tokens) - held, 0) + 2 * needs.largest_kv_bytes(tokens)
        return scratch + growing

    return Governor(
        Limits.of(
            plan.total_bytes,
            needs.demands,
            found_bytes=found_bytes,
            in_place=in_place,
        ),
        needs.demands,
        slots=streaming.slots,
        resize=streaming.resize,
        coming=coming,
        balance=Balance(needs.demands, streaming.uses) if in_place else None,
    )


def _bank_bytes(cache: str | int | None, demands: list[budget.LayerDemand]) -> int | None:
    if cache is None:
        return None
    return budget.least_bank_bytes(demands) if cache == "min" else parse_size(cache)
