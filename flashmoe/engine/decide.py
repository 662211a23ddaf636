"""Deciding what a run will be. Pure: facts in, a plan out; nothing is allocated or opened."""

from __future__ import annotations

from flashmoe.bank.arrivals import reads_apart
from flashmoe.bank.slot_memory import staging_bytes
from flashmoe.base.errors import OptionError
from flashmoe.base.units import parse_size
from flashmoe.checkpoint.config import Config, largest
from flashmoe.engine.facts import MachineFacts, ModelFacts
from flashmoe.engine.options import Options
from flashmoe.engine.plan import Needs, RunPlan
from flashmoe.io.select import choose_page_cache, resolve_reader
from flashmoe.kernels.select import choose_kernel
from flashmoe.memory import budget
from flashmoe.model.route_bias import find_steerable
from flashmoe.probe.tuning import Choice

DEFAULT_CONTEXT = 4096
# Of the memory that is free when no number is given.
DEFAULT_MEMORY_SHARE = 0.75


def decide(
    facts: ModelFacts, options: Options, machine: MachineFacts, tuning: Choice | None = None
) -> RunPlan:
    """The plan of a run of this model on this machine.

    `tuning` is what `flashmoe tune` stored, for what `options` leave open. The plan says itself
    whether it fits. Raises OptionError for options that this model or machine cannot honour, and
    MemoryBudgetError for a bank that is smaller than one token's needs.
    """
    kernel, kernel_reason = choose_kernel(
        options.kernel, machine.missing_kernels, on_cpu=machine.on_cpu
    )
    lossy: list[str] = []
    if options.experts_per_token is not None:
        facts = facts.with_experts_per_token(options.experts_per_token)
        if options.experts_per_token < facts.trained_top_k:
            lossy.append(f"{options.experts_per_token} of {facts.trained_top_k} experts per token")
    if options.route_bias:
        lossy.append(f"route bias {options.route_bias:g}")
    widen = choose_widening(facts.config, options.dtype, on_cpu=machine.on_cpu)
    native_attention = kernel == "cpu" and machine.on_cpu
    needs = Needs(
        facts,
        widen,
        # The native kernels read 16-bit scales and weights of float32 arithmetic as they are.
        widen_records=widen and kernel != "cpu",
        # The library attends in float32 alone; MLX's own attention is fused on GPUs.
        holds_scores=machine.on_cpu and not (native_attention and widen and not facts.holds_scores),
    )
    context = _choose_context(facts.config, options.context)
    memory = _share_memory(needs, options, machine, context)
    page_cache, page_cache_reason = choose_page_cache(
        options.page_cache,
        options.reader,
        machine.uncached_problem,
        file_bytes=facts.streamed_bytes,
        free_bytes=machine.usable_bytes - (memory.planned_bytes - memory.process_bytes),
    )
    reads = (tuning or Choice()).reads(page_cache, options.reader)
    reader = resolve_reader(reads.decode.reader)
    return RunPlan(
        options=options,
        needs=needs,
        context=context,
        kernel=kernel,
        kernel_reason=kernel_reason,
        reader=reader,
        reader_reason=machine.reader_notes[reader],
        page_cache=page_cache,
        page_cache_reason=page_cache_reason,
        reads=reads,
        native_attention=native_attention,
        prefetch=options.prefetch is not False and _can_prefetch(needs),
        steerable=find_steerable(facts.config) if options.route_bias else (),
        memory=memory,
        found_bytes=machine.process_bytes + machine.usable_bytes,
        lossy=tuple(lossy),
    )


def _choose_context(config: Config, context: int | None) -> int:
    """Most tokens of prompt and answer together: what is asked for, or a default that the model
    was made for. Raises OptionError for more than that."""
    most = largest(config, "max_position_embeddings")
    if context is None:
        return min(DEFAULT_CONTEXT, most) if most else DEFAULT_CONTEXT
    if most and context > most:
        raise OptionError(f"context {context} exceeds the {most} tokens the model was made for")
    return context


def choose_widening(config: Config, dtype: str, *, on_cpu: bool) -> bool:
    """Whether 16-bit floats become float32 when they are loaded."""
    if dtype == "auto":
        stated = config.get("dtype", config.get("torch_dtype"))
        return stated == "float32" or on_cpu
    return dtype == "float32"


def _can_prefetch(needs: Needs) -> bool:
    """Whether any record is large enough to be read apart, and lands as kernels see it."""
    return any(
        reads_apart(unit.record.stride) and not staging_bytes(unit.record, needs.widen_records)
        for unit in needs.facts.units
    )


def _share_memory(
    needs: Needs, options: Options, machine: MachineFacts, context: int
) -> budget.MemoryPlan:
    bank_bytes = None
    if options.cache is not None:
        least = budget.least_bank_bytes(needs.demands)
        bank_bytes = least if options.cache == "min" else parse_size(options.cache)
    total_bytes = parse_size(options.memory) if options.memory is not None else None
    if total_bytes is None and bank_bytes is None:
        free_bytes = int(machine.usable_bytes * DEFAULT_MEMORY_SHARE)
        total_bytes = machine.process_bytes + free_bytes
    units = needs.facts.units
    rows_bytes = budget.all_staging_bytes(units, needs.widen_records)

    def scratch(chunk: int, staged: bool) -> int:
        return rows_bytes + needs.scratch_bytes(chunk, context, staged=staged)

    kv_bytes = needs.kv_bytes(context)
    return budget.plan_memory(
        total_bytes=total_bytes,
        bank_bytes=bank_bytes,
        process_bytes=machine.process_bytes + budget.SLACK_BYTES,
        resident_bytes=budget.resident_bytes(needs.facts.resident, needs.widen),
        kv_bytes=kv_bytes,
        prompts=budget.prompt_plans(
            scratch,
            context=context,
            group_bytes=budget.group_bytes(units, needs.widen_records),
            most_records=max(unit.n_records for unit in units),
            chunk=options.prefill_chunk,
        ),
        demands=needs.demands,
        lendable_bytes=kv_bytes - needs.kv_bytes(1),
    )
