"""Who gets how many bytes: one number in, slots per layer out. Pure arithmetic.

Out of the user's number come, in this order, the process itself, the resident weights, the KV
cache at the requested context, scratch and what MLX may keep of freed memory; the bank takes
the rest, and never less than one token's needs, below which an LRU hits nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flashmoe.bank.slot_memory import slot_bytes, staging_bytes
from flashmoe.base.errors import MemoryBudgetError
from flashmoe.base.units import format_size
from flashmoe.store.layout import TensorSpec, Unit

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
MLX_CACHE_SHARE = 1 / 32
LEAST_MLX_CACHE_BYTES = 16 * 10**6
MOST_MLX_CACHE_BYTES = 512 * 10**6
# Run-to-run variation of the process's size at start.
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

    `prompts` is how prompts are fed, with its scratch and staging; `mlx_cache_bytes` is what MLX
    may keep of freed memory. `lent_bytes` of `kv_bytes` are in the bank until the KV cache needs
    them. `least_total_bytes` is the smallest number that would fit.
    """

    total_bytes: int | None
    process_bytes: int
    resident_bytes: int
    kv_bytes: int
    prompts: PromptPlan
    mlx_cache_bytes: int
    slots: tuple[int, ...]
    bank_bytes: int
    least_bank_bytes: int
    most_bank_bytes: int
    least_total_bytes: int
    lent_bytes: int = 0

    @property
    def planned_bytes(self) -> int:
        return (
            self.process_bytes
            + self.resident_bytes
            + self.kv_bytes
            + self.prompts.nbytes
            + self.mlx_cache_bytes
            + self.bank_bytes
            - self.lent_bytes
        )

    @property
    def fits(self) -> bool:
        """Whether everything fits into the number, or no number was given."""
        return self.total_bytes is None or self.planned_bytes <= self.total_bytes

    def check(self) -> None:
        """Raise MemoryBudgetError, naming the least that would fit, when this does not fit."""
        if self.fits or self.total_bytes is None:
            return
        scratch = self.prompts.nbytes + self.mlx_cache_bytes
        raise MemoryBudgetError(
            f"{format_size(self.total_bytes)} of memory is not enough: process "
            f"{format_size(self.process_bytes)} + resident weights "
            f"{format_size(self.resident_bytes)} + KV cache {format_size(self.kv_bytes)} + "
            f"scratch {format_size(scratch)} + bank {format_size(self.bank_bytes)}; "
            f"the least that fits is {_ceil_size(self.least_total_bytes)}",
            self.least_total_bytes,
        )


def layer_demands(units: Sequence[Unit], widen: bool) -> list[LayerDemand]:
    """The slots each layer needs for one token and can use at most."""
    return [
        LayerDemand(slot_bytes(unit.record, widen), unit.step_records, unit.n_records)
        for unit in units
    ]


def resident_bytes(tensors: Iterable[TensorSpec], widen: bool) -> int:
    """Memory of the resident weights, 16-bit floats counted as float32 when widened."""
    return sum(
        tensor.nbytes * (2 if widen and tensor.dtype in ("F16", "BF16") else 1)
        for tensor in tensors
    )


def all_staging_bytes(units: Sequence[Unit], widen: bool) -> int:
    """Memory of the banks' staging rows, in which 16-bit floats wait for being widened."""
    return sum(unit.step_records * staging_bytes(unit.record, widen) for unit in units)


def group_bytes(units: Sequence[Unit], widen: bool) -> int:
    """Memory of one record in each of both staging groups; layers of one layout share theirs."""
    records = {unit.record for unit in units}
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


def choose_prompts(plans: Sequence[PromptPlan], spare_bytes: int | None) -> int:
    """Which of `plans`: the last one that takes at most its share of `spare_bytes` more than the
    first does.

    Without a number to stay under (None) it is the last one with the first one's chunk.
    """
    first = plans[0]
    if spare_bytes is None:
        return max(i for i, plan in enumerate(plans) if plan.chunk_tokens == first.chunk_tokens)
    most_bytes = first.nbytes + int(max(spare_bytes, 0) * PROMPT_SHARE)
    return max(i for i, plan in enumerate(plans) if i == 0 or plan.nbytes <= most_bytes)


def most_beside(plans: Sequence[PromptPlan], chosen: int) -> int | None:
    """The most that the bank may have beyond one token's needs as long as prompts are fed by plan
    `chosen`: what it will have when memory first suffices for the next one. None: no bound.

    Without this, a little more memory could buy larger prompts and leave a smaller bank.
    """
    larger = [plan.nbytes - plans[0].nbytes for plan in plans[chosen + 1 :]]
    return min((math.ceil(more / PROMPT_SHARE) - more for more in larger), default=None)


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


def mlx_cache_bytes(total_bytes: int | None) -> int:
    """How much freed memory MLX may keep; the process counts it as its own."""
    if total_bytes is None:
        return MOST_MLX_CACHE_BYTES
    return round(
        min(max(total_bytes * MLX_CACHE_SHARE, LEAST_MLX_CACHE_BYTES), MOST_MLX_CACHE_BYTES)
    )


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
    demanding first. More memory never makes a smaller bank. The plan says itself whether it fits.

    Raises MemoryBudgetError, naming the least that would fit, when `bank_bytes` is below one
    token's needs.
    """
    least = least_bank_bytes(demands)
    mlx_cache = mlx_cache_bytes(total_bytes)
    beside = process_bytes + resident_bytes + kv_bytes
    spare = None
    if total_bytes is not None:
        needed = beside + mlx_cache + prompts[0].nbytes
        spare = total_bytes - needed - (least if bank_bytes is None else bank_bytes)
    number = choose_prompts(prompts, spare)
    chosen = prompts[number]
    lent = 0
    if bank_bytes is not None:
        slots = share_slots(demands, bank_bytes)
    elif total_bytes is None:
        slots = tuple(demand.most for demand in demands)
    else:
        rest = total_bytes - beside - chosen.nbytes - mlx_cache
        slots = tuple(demand.least for demand in demands)
        if rest >= least:
            bound = most_beside(prompts, number)
            room = rest if bound is None else min(rest, least + bound)
            slots = share_slots(demands, room + lendable_bytes)
            lent = max(0, _slots_bytes(slots, demands) - rest)
    smallest = least if bank_bytes is None else _slots_bytes(slots, demands)
    smallest += prompts[choose_prompts(prompts, 0)].nbytes
    return MemoryPlan(
        total_bytes,
        process_bytes,
        resident_bytes,
        kv_bytes,
        chosen,
        mlx_cache,
        slots,
        _slots_bytes(slots, demands),
        least,
        most_bank_bytes(demands),
        _total_for(beside + smallest) + JITTER_BYTES,
        lent,
    )


def _slots_bytes(slots: Sequence[int], demands: Sequence[LayerDemand]) -> int:
    return sum(n * demand.slot_bytes for n, demand in zip(slots, demands, strict=True))


def _total_for(fixed_bytes: int) -> int:
    """The smallest total that covers `fixed_bytes` and its own share for reuse."""
    growing = max(
        fixed_bytes + LEAST_MLX_CACHE_BYTES, math.ceil(fixed_bytes / (1 - MLX_CACHE_SHARE))
    )
    return min(growing, fixed_bytes + MOST_MLX_CACHE_BYTES) + 1


def _ceil_size(size_bytes: int) -> str:
    """A size rounded up to what `parse_size` reads back as enough: whole MB, or kB below one."""
    unit, name = (10**6, "MB") if size_bytes >= 10**7 else (10**3, "kB")
    return f"{-(-size_bytes // unit)}{name}"
