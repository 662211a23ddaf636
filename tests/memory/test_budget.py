import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flashmoe.base.errors import FlashMoEError, MemoryBudgetError
from flashmoe.base.units import parse_size
from flashmoe.memory.budget import (
    JITTER_BYTES,
    LEAST_MLX_CACHE_BYTES,
    LayerDemand,
    PromptPlan,
    all_staging_bytes,
    layer_demands,
    least_bank_bytes,
    mlx_cache_bytes,
    plan_memory,
    resident_bytes,
    scratch_bytes,
    share_slots,
)
from flashmoe.store.layout import TensorSpec
from tests.support.stores import layer_layout

MB = 10**6
# One token needs 3 layers x 2 slots x 1000 bytes; everything is 24,000 bytes.
DEMANDS = [LayerDemand(1000, 2, 8)] * 3
FIXED = {
    "process_bytes": 10 * MB,
    "resident_bytes": 20 * MB,
    "kv_bytes": 1 * MB,
    "prompts": [PromptPlan(256, 0, 2 * MB, 0)],
}
FIXED_BYTES = 33 * MB + LEAST_MLX_CACHE_BYTES

demand = st.tuples(st.integers(1, 5000), st.integers(1, 6), st.integers(0, 12)).map(
    lambda drawn: LayerDemand(drawn[0], drawn[1], drawn[1] + drawn[2])
)
demands = st.lists(demand, min_size=1, max_size=7)


def named_least(error):
    """The size that the message tells the user to give."""
    return parse_size(re.search(r"the least that (?:fits|works) is (\S+)$", str(error))[1])


def plan(total_bytes=None, bank_bytes=None, *, demands=DEMANDS, **fixed):
    made = plan_memory(
        total_bytes=total_bytes, bank_bytes=bank_bytes, demands=demands, **{**FIXED, **fixed}
    )
    made.check()
    return made


class TestShareSlots:
    @pytest.mark.parametrize(
        ("bank_bytes", "slots"),
        [
            (6000, (2, 2, 2)),
            (6999, (2, 2, 2)),
            (7000, (3, 2, 2)),
            (8000, (3, 3, 2)),
            (9000, (3, 3, 3)),
            (23_999, (8, 8, 7)),
            (24_000, (8, 8, 8)),
            (10**15, (8, 8, 8)),
        ],
    )
    def test_the_remainder_goes_to_the_first_layers(self, bank_bytes, slots):
        assert share_slots(DEMANDS, bank_bytes) == slots

    def test_a_full_layer_leaves_its_share_to_the_others(self):
        demands = [LayerDemand(10, 1, 2), LayerDemand(10, 1, 100), LayerDemand(10, 1, 100)]
        assert share_slots(demands, 210) == (2, 10, 9)

    def test_counts_even_out_from_different_leasts(self):
        demands = [LayerDemand(10, 1, 100), LayerDemand(10, 5, 100)]
        assert share_slots(demands, 90) == (4, 5)
        assert share_slots(demands, 100) == (5, 5)
        assert share_slots(demands, 110) == (6, 5)

    def test_what_is_too_big_for_one_layer_goes_to_another(self):
        assert share_slots([LayerDemand(100, 1, 9), LayerDemand(10, 1, 9)], 160) == (1, 6)

    @pytest.mark.parametrize("bank_bytes", [5999, 1, 0, -(10**9)])
    def test_below_one_tokens_needs(self, bank_bytes):
        with pytest.raises(MemoryBudgetError, match="below one token's needs") as caught:
            share_slots(DEMANDS, bank_bytes)
        assert caught.value.least_bytes == 6000
        assert str(caught.value).endswith("the least that works is 6kB")
        assert isinstance(caught.value, FlashMoEError)

    @given(demands, st.integers(0, 200_000))
    def test_within_the_bytes_and_the_bounds(self, demands, more_bytes):
        bank_bytes = least_bank_bytes(demands) + more_bytes
        slots = share_slots(demands, bank_bytes)
        left = bank_bytes - sum(n * d.slot_bytes for n, d in zip(slots, demands, strict=True))
        assert left >= 0
        for n, d in zip(slots, demands, strict=True):
            assert d.least <= n <= d.most
            # Nothing is left over that a layer could have used.
            assert n == d.most or left < d.slot_bytes

    @given(demands, st.integers(0, 400))
    @example([LayerDemand(1, 1, 100), LayerDemand(1, 5, 100)], 3)
    def test_counts_differ_by_one_at_most(self, demands, more_slots):
        """Slots of one size: a layer grows only when none that can grow has fewer."""
        demands = [LayerDemand(7, d.least, d.most) for d in demands]
        slots = share_slots(demands, least_bank_bytes(demands) + 7 * more_slots)
        for n, d in zip(slots, demands, strict=True):
            for other, e in zip(slots, demands, strict=True):
                if n < d.most and other > e.least:
                    assert other <= n + 1

    @given(demands, st.integers(1, 10**6))
    def test_the_named_least_works(self, demands, short_bytes):
        least = least_bank_bytes(demands)
        with pytest.raises(MemoryBudgetError) as caught:
            share_slots(demands, least - short_bytes)
        assert caught.value.least_bytes == least
        assert share_slots(demands, least) == tuple(d.least for d in demands)
        named = named_least(caught.value)
        assert least <= named < least + 1000
        share_slots(demands, named)

    def test_a_model_of_30_720_slots(self):
        demands = [LayerDemand(7_077_888, 10, 512)] * 60
        slots = share_slots(demands, 30 * 10**9)
        assert slots == (71,) * 38 + (70,) * 22
        assert sum(slots) * 7_077_888 == 29_996_089_344


class TestPlanMemory:
    def test_nothing_given_takes_everything(self):
        plan_ = plan()
        assert (plan_.total_bytes, plan_.slots, plan_.bank_bytes) == (None, (8, 8, 8), 24_000)
        assert plan_.least_bank_bytes == 6000

    def test_a_bank_alone(self):
        plan_ = plan(bank_bytes=7500)
        assert (plan_.total_bytes, plan_.slots, plan_.bank_bytes) == (None, (3, 2, 2), 7000)

    def test_a_bank_below_one_tokens_needs(self):
        for total_bytes in (None, 10**9):
            with pytest.raises(MemoryBudgetError, match=r"a bank of 6\.00 kB is below") as caught:
                plan(total_bytes, 5999)
            assert caught.value.least_bytes == 6000
            assert plan(total_bytes, named_least(caught.value)).slots == (2, 2, 2)

    @pytest.mark.parametrize(
        ("rest", "slots"),
        [(6000, (2, 2, 2)), (7999, (3, 2, 2)), (24_000, (8, 8, 8)), (50 * MB, (8, 8, 8))],
    )
    def test_the_bank_takes_the_rest(self, rest, slots):
        plan_ = plan(FIXED_BYTES + rest)
        assert plan_.slots == slots
        assert plan_.bank_bytes == 1000 * sum(slots)
        assert plan_.planned_bytes == FIXED_BYTES + plan_.bank_bytes <= plan_.total_bytes
        assert (plan_.process_bytes, plan_.resident_bytes) == (10 * MB, 20 * MB)
        assert (plan_.kv_bytes, plan_.prompts.nbytes) == (1 * MB, 2 * MB)
        assert plan_.mlx_cache_bytes == LEAST_MLX_CACHE_BYTES

    @pytest.mark.parametrize("total_bytes", [FIXED_BYTES + 5999, FIXED_BYTES, 10 * MB, 1])
    def test_too_little(self, total_bytes):
        with pytest.raises(MemoryBudgetError, match="of memory is not enough") as caught:
            plan(total_bytes)
        smallest = FIXED_BYTES + 6000
        assert smallest <= caught.value.least_bytes <= smallest + JITTER_BYTES + 1
        for part in (
            "process 10.0 MB",
            "resident weights 20.0 MB",
            "KV cache 1.00 MB",
            "scratch ",
            "bank 6.00 kB",
        ):
            assert part in str(caught.value)
        assert plan(smallest).slots == (2, 2, 2)
        assert named_least(caught.value) % MB == 0
        plan(caught.value.least_bytes)
        plan(named_least(caught.value))

    def test_a_total_and_a_bank(self):
        assert plan(FIXED_BYTES + 9000, 9000).slots == (3, 3, 3)
        assert plan(10**9, 9000).slots == (3, 3, 3)
        with pytest.raises(MemoryBudgetError, match=r"bank 9\.00 kB") as caught:
            plan(FIXED_BYTES + 8999, 9999)
        assert 0 <= caught.value.least_bytes - (FIXED_BYTES + 9000) <= JITTER_BYTES + 1
        assert plan(caught.value.least_bytes, 9999).slots == (3, 3, 3)

    @given(
        st.integers(1, 10**11),
        st.sampled_from([0, 10**6, 10**9, 10**10]),
        demands,
        st.none() | st.integers(0, 10**5),
    )
    @settings(max_examples=200)
    @example(100 * MB, 10**10, DEMANDS, None)
    @example(17_900 * MB, 10**10, DEMANDS, None)
    def test_the_named_least_passes(self, total_bytes, weights, demands, more_bank):
        bank_bytes = None if more_bank is None else least_bank_bytes(demands) + more_bank
        options = {"bank_bytes": bank_bytes, "demands": demands, "resident_bytes": weights}
        try:
            found = plan(total_bytes, **options)
        except MemoryBudgetError as error:
            assert error.least_bytes > total_bytes
            named = named_least(error)
            assert error.least_bytes <= named < error.least_bytes + 10**6
            assert plan(error.least_bytes, **options).planned_bytes <= error.least_bytes
            found = plan(named, **options)
        assert found.planned_bytes <= found.total_bytes
        assert found.planned_bytes == (
            found.process_bytes
            + found.resident_bytes
            + found.kv_bytes
            + found.prompts.nbytes
            + found.mlx_cache_bytes
            + found.bank_bytes
        )
        used = sum(n * d.slot_bytes for n, d in zip(found.slots, demands, strict=True))
        assert found.bank_bytes == used >= found.least_bank_bytes == least_bank_bytes(demands)

    @given(st.integers(0, 10**11))
    @example(0)
    @example(10**12)
    def test_the_named_least_is_not_far_from_the_smallest_that_passes(self, kv_bytes):
        """The process may measure itself a little larger the next time, so some is added."""
        with pytest.raises(MemoryBudgetError) as caught:
            plan(1, kv_bytes=kv_bytes)
        least = caught.value.least_bytes
        assert plan(least - JITTER_BYTES, kv_bytes=kv_bytes).slots >= (2, 2, 2)
        with pytest.raises(MemoryBudgetError) as again:
            plan(least - JITTER_BYTES - 4, kv_bytes=kv_bytes)
        assert again.value.least_bytes == least


def test_reuse_grows_with_the_total_between_bounds():
    assert [mlx_cache_bytes(n) for n in (1, 512 * MB, 3200 * MB, 10**12, None)] == [
        16 * MB,
        16 * MB,
        100 * MB,
        512 * MB,
        512 * MB,
    ]


def test_layer_demands():
    layouts = [layer_layout(0, n_experts=4, top_k=2), layer_layout(1, n_experts=9, top_k=3)]
    layers = [layout.unit for layout in layouts]
    # 4096 + 192 + 140 bytes; the last two are 16-bit floats.
    assert layer_demands(layers, False) == [LayerDemand(4428, 2, 4), LayerDemand(4428, 3, 9)]
    assert layer_demands(layers, True) == [LayerDemand(4760, 2, 4), LayerDemand(4760, 3, 9)]
    assert all_staging_bytes(layers, False) == 0
    assert all_staging_bytes(layers, True) == 5 * 2 * 4096


def test_resident_bytes():
    tensors = (
        TensorSpec("a", "BF16", (10,)),
        TensorSpec("b", "F16", (5,)),
        TensorSpec("c", "F32", (3,)),
        TensorSpec("d", "U32", (2,)),
        TensorSpec("e", "U8", (1,)),
    )
    assert resident_bytes(tensors, False) == 51
    assert resident_bytes(tensors, True) == 81


def test_scratch_bytes():
    sizes = {"chunk": 256, "context": 4096, "width": 2048, "heads": 16, "vocabulary": 151_936}
    fused = scratch_bytes(**sizes, top_k=8, held_scores=False, staged=False)
    assert fused == 4 * 256 * 2048 * 72 + 3 * 256 * 4096 + 16 * 151_936
    whole = scratch_bytes(**sizes, top_k=8, held_scores=True, staged=False)
    assert whole - fused == 12 * 16 * 256 * 4096
    staged = scratch_bytes(**sizes, top_k=8, held_scores=False, staged=True)
    assert fused - staged == 4 * 256 * 2048 * 3 * 8


class TestLending:
    """The KV cache's memory is in the bank until it is needed."""

    def test_what_is_lendable_goes_to_the_bank(self):
        plan_ = plan(FIXED_BYTES + 8000, lendable_bytes=7000)
        assert (plan_.bank_bytes, plan_.lent_bytes) == (15_000, 7000)
        assert plan_.planned_bytes == plan_.total_bytes

    def test_a_full_bank_needs_less(self):
        plan_ = plan(FIXED_BYTES + 20_000, lendable_bytes=7000)
        assert (plan_.bank_bytes, plan_.lent_bytes) == (24_000, 4000)
        plan_ = plan(FIXED_BYTES + 30_000, lendable_bytes=7000)
        assert (plan_.bank_bytes, plan_.lent_bytes) == (24_000, 0)

    def test_what_does_not_fit_at_full_context_is_refused(self):
        with pytest.raises(MemoryBudgetError):
            plan(FIXED_BYTES + 5999, lendable_bytes=10**6)
        assert plan(FIXED_BYTES + 6000, lendable_bytes=1000).slots == (3, 2, 2)

    def test_a_given_bank_is_lent_nothing(self):
        plan_ = plan(FIXED_BYTES + 20_000, 7000, lendable_bytes=7000)
        assert (plan_.bank_bytes, plan_.lent_bytes) == (7000, 0)
        assert plan(lendable_bytes=7000).lent_bytes == 0
