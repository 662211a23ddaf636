"""How prompts are fed: tokens at once and records in staging, for the memory there is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.base.errors import MemoryBudgetError
from flashmoe.memory.budget import (
    LayerDemand,
    PromptPlan,
    choose_prompts,
    group_bytes,
    plan_memory,
    prompt_plans,
)
from flashmoe.store.layout import TensorSpec
from tests.support.stores import layer_layout

MB = 10**6
DEMANDS = [LayerDemand(MB, 2, 100)] * 4


def scratch(chunk, staged):
    return chunk * (1000 if staged else 1500)


def plans(context=4096, most_records=64):
    return prompt_plans(scratch, context=context, group_bytes=10, most_records=most_records)


def test_groups_grow_before_the_chunk():
    assert [(plan.chunk_tokens, plan.group_records) for plan in plans()] == [
        (256, 0),
        (256, 1),
        (256, 2),
        (256, 4),
        (256, 8),
        (256, 16),
        (512, 16),
        (1024, 16),
        (2048, 16),
    ]
    assert plans()[0] == PromptPlan(256, 0, 384_000, 0)
    assert plans()[-1] == PromptPlan(2048, 16, 2_048_000, 160)
    assert plans()[-1].nbytes == 2_048_160


@pytest.mark.parametrize(
    ("context", "chunks"),
    [(1, [1]), (200, [200]), (256, [256]), (545, [256, 512, 545]), (10**6, [256, 512, 1024, 2048])],
)
def test_no_chunk_beyond_the_context(context, chunks):
    found = plans(context)
    assert sorted({plan.chunk_tokens for plan in found}) == chunks
    assert found[0].chunk_tokens == chunks[0]


def test_a_given_chunk():
    found = prompt_plans(scratch, context=4096, group_bytes=10, most_records=2, chunk=300)
    assert [(plan.chunk_tokens, plan.group_records) for plan in found] == [
        (300, 0),
        (300, 1),
        (300, 2),
    ]
    [short, *_] = prompt_plans(scratch, context=200, group_bytes=10, most_records=0, chunk=300)
    assert short.chunk_tokens == 200


def test_no_group_beyond_the_experts_of_a_layer():
    assert sorted({plan.group_records for plan in plans(most_records=5)}) == [0, 1, 2, 4, 5]


@pytest.mark.parametrize(
    ("spare_bytes", "chunk_tokens", "group_records"),
    [
        (None, 256, 16),
        (-(10**9), 256, 16),
        (8 * 128_000, 256, 16),
        (8 * 128_160, 512, 16),
        (8 * 1_664_159, 1024, 16),
        (8 * 1_664_160, 2048, 16),
    ],
)
def test_prompts_get_their_share_of_what_is_spare(spare_bytes, chunk_tokens, group_records):
    chosen = plans()[choose_prompts(plans(), spare_bytes)]
    assert (chosen.chunk_tokens, chosen.group_records) == (chunk_tokens, group_records)


def test_no_staging_when_it_takes_more_than_its_share():
    dear = prompt_plans(scratch, context=4096, group_bytes=10**6, most_records=64)
    assert dear[choose_prompts(dear, 0)].group_records == 0
    assert dear[choose_prompts(dear, 8 * 872_000 - 8)].group_records == 0
    assert dear[choose_prompts(dear, 8 * 872_000)].group_records == 1


def plan(total_bytes, prompts, bank_bytes=None):
    made = plan_memory(
        total_bytes=total_bytes,
        bank_bytes=bank_bytes,
        process_bytes=10 * MB,
        resident_bytes=20 * MB,
        kv_bytes=0,
        prompts=prompts,
        demands=DEMANDS,
    )
    made.check()
    return made


@given(st.integers(1, 2000), st.integers(0, 5 * MB), st.none() | st.integers(8, 400))
def test_prompts_never_raise_the_least_that_fits(total, group_bytes, bank):
    """Whatever fits when prompts go through the bank fits with the choice of staging, too."""
    prompts = prompt_plans(scratch, context=4096, group_bytes=group_bytes, most_records=64)
    bank_bytes = None if bank is None else bank * MB
    try:
        plain = plan(total * MB, prompts[:1], bank_bytes)
    except MemoryBudgetError:
        return
    found = plan(total * MB, prompts, bank_bytes)
    assert found.planned_bytes <= found.total_bytes
    assert found.bank_bytes >= found.least_bank_bytes
    lost = plain.bank_bytes - found.bank_bytes
    assert lost <= (plain.total_bytes - plain.planned_bytes + plain.bank_bytes) / 8 + MB


def test_layers_of_one_layout_share_their_groups():
    layers = [x.unit for x in (layer_layout(0), layer_layout(1), layer_layout(2, n_experts=9))]
    # 4096 + 192 + 140 bytes; the last two are 16-bit floats, read into a block each.
    assert group_bytes(layers, False) == 2 * 4428
    assert group_bytes(layers, True) == 2 * (4760 + 2 * 4096)
    other = layer_layout(3, tensors=[TensorSpec("gate_proj.weight", "U32", (32, 32))]).unit
    assert group_bytes([*layers, other], False) == 2 * (4428 + 4096)
