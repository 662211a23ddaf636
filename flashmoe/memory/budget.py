"""Who gets how many bytes: one number in, slots per layer out. Pure arithmetic.

Out of the user's number come, in this order, the process itself, the resident weights, the KV
cache at the requested context, scratch and what MLX may keep of freed memory; the bank takes
the rest, and never less than one token's needs, below which an LRU hits nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashmoe.bank.slot_memory import slot_bytes, staging_bytes
from flashmoe.base.errors import MemoryBudgetError
from flashmoe.base.units import format_size
from flashmoe.store.layout import LayerLayout
from flashmoe.store.manifest import Manifest

# Tokens of a prompt that are fed at once.
LEAST_CHUNK_TOKENS = 256
MOST_CHUNK_TOKENS = 2048
# Records in each of the two staging groups of prompts; none means through the bank.
GROUP_RECORDS = (0, 1, 2, 4, 8, 16)
# Of what is left beyond one token's needs, what prompts may take from the bank.
PROMPT_SHARE = 1 / 8
# The allocator's slack and what libraries allocate after start-up.
SLACK_BYTES = 32 * 10**6
# MLX keeps freed buffers for reuse: up to this share of the total, within these bounds.
REUSE_SHARE = 1 / 32
LEAST_REUSE_BYTES = 16 * 10**6
MOST_REUSE_BYTES = 512 * 10**6
# By which a process can start out larger the next time.
JITTER_BYTES = 8 * 10**6


@dataclass(frozen=True)
class LayerDemand:
    """What a layer's bank may be made of: slots of `slot_bytes`, from `least` to `most`."""

    slot_bytes: int
    least: int
    most: int


@dataclass(frozen=True)
class PromptPlan:
    """How prompts are fed: tokens at once, records per staging group, and what that takes."""

    chunk_tokens: int
    group_records: int
    scratch_bytes: int
    staging_bytes: int

    @property
    def nbytes(self) -> int:
        return self.scratch_bytes + self.staging_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Where every byte goes; `total_bytes` is None when only the bank's size was given.

    `prompts` is how prompts are fed, with its scratch and staging. `lent_bytes` of `kv_bytes`
    are in the bank until the KV cache needs them.
    """

    total_bytes: int | None
    process_bytes: int
    resident_bytes: int
    kv_bytes: int
    prompts: PromptPlan
    reuse_bytes: int
    slots: tuple[int, ...]
    bank_bytes: int
    least_bank_bytes: int
    most_bank_bytes: int
    lent_bytes: int = 0

    @property
    def planned_bytes(self) -> int:
        return (
            self.process_bytes
            + self.resident_bytes
            + self.kv_bytes
            + self.prompts.nbytes
            + self.reuse_bytes
            + self.bank_bytes
            - self.lent_bytes
        )


def layer_demands(layers: Sequence[LayerLayout], widen: bool) -> list[LayerDemand]:
    """The slots each layer needs for one token and can use at most."""
    return [
        LayerDemand(slot_bytes(layer.record, widen), layer.top_k, layer.n_experts)
        for layer in layers
    ]


def resident_bytes(manifest: Manifest, widen: bool) -> int:
    """Memory of the resident weights, 16-bit floats counted as float32 when widened."""
    total = 0
    for shard in manifest.resident:
        for tensor in shard.tensors:
            doubled = widen and tensor.dtype in ("F16", "BF16")
            total += tensor.nbytes * (2 if doubled else 1)
    return total


def all_staging_bytes(layers: Sequence[LayerLayout], widen: bool) -> int:
    """Memory of the banks' staging rows, in which 16-bit floats wait for being widened."""
    return sum(layer.top_k * staging_bytes(layer.record, widen) for layer in layers)


def group_bytes(layers: Sequence[LayerLayout], widen: bool) -> int:
    """Memory of one record in each of both staging groups; layers of one layout share theirs."""
    records = {layer.record for layer in layers}
    return 2 * sum(slot_bytes(record, widen) + staging_bytes(record, widen) for record in records)


def scratch_bytes(
    *,
    chunk: int,
    context: int,
    width: int,
    heads: int,
    vocabulary: int,
    top_k: int,
    held_scores: bool,
    staged: bool,
) -> int:
    """An upper estimate of what evaluating one prompt chunk needs beside weights and caches.

    Expert outputs [chunk, top_k, width] float32 exist about six times at once through the bank
    (parts, their concatenation, the reordered and the weighted copy, and their inputs) and three
    times in a prefill, other activations [chunk, width] about 24 times; attention scores
    [heads, chunk, context] three times where they are held for all keys at once, masks [chunk,
    context] of one byte three times; logits of one token four times while sampling.
    """
    activations = 4 * chunk * width * ((3 if staged else 6) * top_k + 24)
    scores = chunk * context * (3 + (12 * heads if held_scores else 0))
    return activations + scores + 16 * vocabulary


def prompt_plans(
    scratch: Callable[[int, bool], int],
    *,
    context: int,
    group_bytes: int,
    most_records: int,
    chunk: int | None = None,
) -> list[PromptPlan]:
    """The ways to feed prompts of up to `context` tokens, the least demanding first.

    First the staging groups grow, up to `most_records` (the experts of a layer), then the chunk,
    unless it is given.
    `scratch(chunk, staged)` is what a chunk needs, `group_bytes` one record in both groups.
    """
    chunks = [min(chunk or LEAST_CHUNK_TOKENS, context)]
    while chunk is None and chunks[-1] < min(MOST_CHUNK_TOKENS, context):
        chunks.append(min(2 * chunks[-1], MOST_CHUNK_TOKENS, context))
    groups = sorted({min(records, most_records) for records in GROUP_RECORDS})
    steps = [(chunks[0], records) for records in groups]
    steps += [(chunk, groups[-1]) for chunk in chunks[1:] if groups[-1]]
    return [
        PromptPlan(chunk, records, scratch(chunk, records > 0), records * group_bytes)
        for chunk, records in steps
    ]


def choose_prompts(plans: Sequence[PromptPlan], spare_bytes: int | None) -> PromptPlan:
    """The last of `plans` that takes at most its share of `spare_bytes` more than the first does.

    Without a number to stay under (None) it is the last one with the first one's chunk.
    """
    first = plans[0]
    if spare_bytes is None:
        return [plan for plan in plans if plan.chunk_tokens == first.chunk_tokens][-1]
    most_bytes = first.nbytes + int(max(spare_bytes, 0) * PROMPT_SHARE)
    return [plan for plan in plans if plan is first or plan.nbytes <= most_bytes][-1]


def share_slots(demands: Sequence[LayerDemand], bank_bytes: int) -> tuple[int, ...]:
    """Slots per layer within `bank_bytes`: equal counts, the remainder to the first layers.

    Raises MemoryBudgetError when the bytes do not cover one token's needs.
    """
    least = least_bank_bytes(demands)
    if bank_bytes < least:
        raise MemoryBudgetError(
            f"a bank of {format_size(bank_bytes)} is below one token's needs; "
            f"the least that works is {_ceil_size(least)}",
            least,
        )
    slots = [demand.least for demand in demands]
    left = bank_bytes - least
    # Always the layer that has fewest, until nothing more fits.
    growing = [(demand.least, i) for i, demand in enumerate(demands) if demand.least < demand.most]
    heapq.heapify(growing)
    while growing:
        count, i = heapq.heappop(growing)
        if demands[i].slot_bytes <= left:
            slots[i] = count + 1
            left -= demands[i].slot_bytes
            if slots[i] < demands[i].most:
                heapq.heappush(growing, (slots[i], i))
    return tuple(slots)


def reuse_bytes(total_bytes: int | None) -> int:
    """How much freed memory MLX may keep; the process counts it as its own."""
    if total_bytes is None:
        return MOST_REUSE_BYTES
    return round(min(max(total_bytes * REUSE_SHARE, LEAST_REUSE_BYTES), MOST_REUSE_BYTES))


def least_bank_bytes(demands: Sequence[LayerDemand]) -> int:
    """One token's needs over all layers."""
    return sum(demand.least * demand.slot_bytes for demand in demands)


def most_bank_bytes(demands: Sequence[LayerDemand]) -> int:
    """Every expert of every layer."""
    return sum(demand.most * demand.slot_bytes for demand in demands)


def plan_memory(
    *,
    total_bytes: int | None,
    bank_bytes: int | None,
    process_bytes: int,
    resident_bytes: int,
    kv_bytes: int,
    prompts: Sequence[PromptPlan],
    demands: Sequence[LayerDemand],
    lendable_bytes: int = 0,
) -> MemoryPlan:
    """Share `total_bytes` out; `bank_bytes` fixes the bank instead of giving it the rest.

    Of `kv_bytes`, the bank has `lendable_bytes` as long as they are not needed, but for what
    it cannot give back: one token's needs. `prompts` are the ways to feed prompts, the least
    demanding first.

    Raises MemoryBudgetError, naming the least that would fit, when something does not.
    """
    least = least_bank_bytes(demands)
    reuse = reuse_bytes(total_bytes)
    spare = None
    if total_bytes is not None:
        needed = process_bytes + resident_bytes + kv_bytes + reuse + prompts[0].nbytes
        spare = total_bytes - needed - (least if bank_bytes is None else bank_bytes)
    chosen = choose_prompts(prompts, spare)
    lent = 0
    if bank_bytes is not None:
        slots = share_slots(demands, bank_bytes)
    elif total_bytes is None:
        slots = tuple(demand.most for demand in demands)
    else:
        fixed = process_bytes + resident_bytes + kv_bytes + chosen.nbytes + reuse
        rest = total_bytes - fixed
        slots = tuple(demand.least for demand in demands)
        if rest >= least:
            slots = share_slots(demands, rest + lendable_bytes)
            lent = max(0, _slots_bytes(slots, demands) - rest)
    used = _slots_bytes(slots, demands)
    plan = MemoryPlan(
        total_bytes,
        process_bytes,
        resident_bytes,
        kv_bytes,
        chosen,
        reuse,
        slots,
        used,
        least,
        most_bank_bytes(demands),
        lent,
    )
    if total_bytes is not None and plan.planned_bytes > total_bytes:
        enough = _total_for(plan.planned_bytes - reuse) + JITTER_BYTES
        raise MemoryBudgetError(
            f"{format_size(total_bytes)} of memory is not enough: process "
            f"{format_size(process_bytes)} + resident weights {format_size(resident_bytes)} + "
            f"KV cache {format_size(kv_bytes)} + scratch {format_size(chosen.nbytes + reuse)} + "
            f"bank {format_size(used)}; the least that fits is {_ceil_size(enough)}",
            enough,
        )
    return plan


def _slots_bytes(slots: Sequence[int], demands: Sequence[LayerDemand]) -> int:
    return sum(n * demand.slot_bytes for n, demand in zip(slots, demands, strict=True))


def _total_for(fixed_bytes: int) -> int:
    """The smallest total that covers `fixed_bytes` and its own share for reuse."""
    growing = max(fixed_bytes + LEAST_REUSE_BYTES, math.ceil(fixed_bytes / (1 - REUSE_SHARE)))
    return min(growing, fixed_bytes + MOST_REUSE_BYTES) + 1


def _ceil_size(size_bytes: int) -> str:
    """A size rounded up to what `parse_size` reads back as enough: whole MB, or kB below one."""
    unit, name = (10**6, "MB") if size_bytes >= 10**7 else (10**3, "kB")
    return f"{-(-size_bytes // unit)}{name}"
