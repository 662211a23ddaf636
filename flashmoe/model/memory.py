"""What a store's model needs of memory, measured on its config and manifest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx

from flashmoe import machine
from flashmoe.checkpoint.architecture import Routing
from flashmoe.checkpoint.caches import cache_bytes
from flashmoe.checkpoint.config import Config, largest
from flashmoe.errors import OptionError
from flashmoe.options import Options
from flashmoe.store.manifest import Manifest
from flashmoe.streaming import budget
from flashmoe.tuning import BankChoice, Choice
from flashmoe.units import parse_size

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


def plan_model(
    manifest: Manifest,
    config: Config,
    probed: Routing,
    options: Options,
    *,
    widen: bool,
    widen_records: bool,
) -> budget.MemoryPlan:
    """Where every byte of a model goes that runs in this process.

    `widen` and `widen_records`: whether resident weights and records become float32. Raises
    MemoryBudgetError, naming the least that would fit, and what `choose_context` raises.
    """
    context = choose_context(config, options.context)
    layouts = [layer.layout for layer in manifest.layers]
    demands = budget.layer_demands(layouts, widen_records)
    bank_bytes = _bank_bytes(options.cache, demands)
    total_bytes = parse_size(options.memory) if options.memory is not None else None
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

    return budget.plan_memory(
        total_bytes=total_bytes,
        bank_bytes=bank_bytes,
        process_bytes=machine.resident_set_bytes() + budget.SLACK_BYTES,
        resident_bytes=budget.resident_bytes(manifest, widen),
        kv_bytes=_kv_bytes(probed.caches, context, manifest, widen),
        prompts=budget.prompt_plans(
            scratch,
            context=context,
            group_bytes=budget.group_bytes(layouts, widen_records),
            most_records=max(layout.n_experts for layout in layouts),
        ),
        demands=demands,
    )


def choose_bank(options: Options, choice: Choice, plan: budget.MemoryPlan) -> BankChoice | None:
    """What `choice` says about the bank of a plan; None when that was measured with another
    amount of memory, or not at all."""
    if choice.bank is None:
        return None
    # A bank that the user fixed is compared with the one that ran.
    share = 1.0 if options.cache is None else choice.bank.bank_share
    return choice.bank if choice.bank.holds_for(round(plan.bank_bytes / share)) else None


def shrink_bank(
    plan: budget.MemoryPlan, manifest: Manifest, share: float, *, widen_records: bool
) -> budget.MemoryPlan:
    """A plan whose bank has that share of its bytes, but never less than one token's needs.

    Nothing else changes: another chunk size would change results.
    """
    layouts = [layer.layout for layer in manifest.layers]
    demands = budget.layer_demands(layouts, widen_records)
    smaller = max(plan.least_bank_bytes, int(plan.bank_bytes * share))
    slots = budget.share_slots(demands, smaller)
    used = sum(n * demand.slot_bytes for n, demand in zip(slots, demands, strict=True))
    return replace(plan, slots=slots, bank_bytes=used)


def _kv_bytes(caches: list[Any], context: int, manifest: Manifest, widen: bool) -> int:
    """The probe's caches are float32; what runs has 16-bit ones where activations are 16-bit."""
    tensors = [tensor.dtype for shard in manifest.resident for tensor in shard.tensors]
    narrow = not widen and ("BF16" in tensors or "F16" in tensors) and "F32" not in tensors
    return cache_bytes(caches, context) // (2 if narrow else 1)


def _bank_bytes(cache: str | int | None, demands: list[budget.LayerDemand]) -> int | None:
    if cache is None:
        return None
    return budget.least_bank_bytes(demands) if cache == "min" else parse_size(cache)
