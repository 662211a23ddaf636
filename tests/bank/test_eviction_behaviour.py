"""What sets each policy apart, on sequences made by hand."""

import pytest

from flashmoe.bank.policy.clock import Clock
from flashmoe.bank.policy.contract import Policy
from flashmoe.bank.policy.lfu import LARGEST_WEIGHT, LFU
from flashmoe.bank.policy.lru import LRU
from flashmoe.bank.policy.s3fifo import S3FIFO
from flashmoe.bank.policy.slru import SLRU


def access(policy: Policy, *experts: int) -> list[int]:
    """Use experts one after the other with one victim per miss once full; the victims."""
    victims = []
    for expert in experts:
        if expert not in policy and len(policy) == policy.capacity:
            victims.append(policy.victim({expert}))
        policy.use(expert)
    return victims


def evict_all(policy: Policy) -> list[int]:
    return [policy.victim(set()) for _ in range(len(policy))]


def test_lru_evicts_by_last_use() -> None:
    policy = LRU(4)
    access(policy, 0, 1, 2, 3, 1, 0)
    assert evict_all(policy) == [2, 3, 1, 0]


def test_clock_gives_a_second_chance() -> None:
    policy = Clock(3)
    access(policy, 0, 1, 2, 0)
    # 0 is the oldest but was used again: it loses its mark and 1 goes.
    assert access(policy, 3) == [1]
    # Used or not since then, the second chance is gone.
    assert access(policy, 4) == [2]
    assert access(policy, 5) == [0]


def test_clock_does_not_reorder_on_use() -> None:
    policy = Clock(3)
    access(policy, 0, 1, 2, 2, 1, 0)
    assert evict_all(policy) == [0, 1, 2]


def test_clock_keeps_the_marks_of_pinned_experts() -> None:
    policy = Clock(3)
    access(policy, 0, 1, 2, 0)
    assert policy.victim({0, 1}) == 2
    assert policy.victim(set()) == 1


SCAN = range(100, 140)


@pytest.mark.parametrize("kind", [SLRU, S3FIFO])
def test_what_is_used_often_survives_a_scan(kind: type[Policy]) -> None:
    policy = kind(10)
    often = [1, 2, 3, 4]
    access(policy, *often, *often, *often, *often)
    access(policy, *SCAN)
    assert all(expert in policy for expert in often)


def test_lru_does_not_survive_a_scan() -> None:
    policy = LRU(10)
    access(policy, *[1, 2, 3, 4] * 4, *SCAN)
    assert sorted(evict_all(policy)) == list(SCAN)[-10:]


def test_slru_protects_from_the_second_use_on() -> None:
    policy = SLRU(4, protected_share=0.5)
    access(policy, 0, 1, 2, 3, 0, 1)
    assert access(policy, 4) == [2]
    # A third protected expert throws the least recent one of them back on probation, as its
    # most recent.
    access(policy, 3)
    assert evict_all(policy) == [4, 0, 1, 3]


def test_s3fifo_remembers_ghosts() -> None:
    policy = S3FIFO(4)
    access(policy, 0, 1, 2, 3)
    assert access(policy, 4) == [0]
    # 0 comes back while it is remembered, and into the main queue: it outlives newer ones.
    assert access(policy, 0) == [1]
    assert access(policy, 5, 6, 7) == [2, 3, 4]
    assert 0 in policy


def test_s3fifo_forgets_old_ghosts() -> None:
    policy = S3FIFO(4)
    access(policy, 0, 1, 2, 3, 4, 5, 6, 7)
    # Three ghosts at most: 0 is no longer one and comes in like a new expert.
    access(policy, 0)
    assert access(policy, 8, 9, 10, 11)[-1] == 0


def test_s3fifo_moves_on_what_was_used_twice_more() -> None:
    policy = S3FIFO(4)
    access(policy, 0, 1, 2, 3, 0, 0, 1)
    # 0 moves on, 1 was used once more only.
    assert access(policy, 4, 5, 6) == [1, 2, 3]
    assert 0 in policy


def test_lfu_counts_uses() -> None:
    policy = LFU(4, half_life=1e9)
    access(policy, 0, 0, 0, 1, 1, 2, 3, 3)
    assert evict_all(policy) == [2, 1, 3, 0]


def test_lfu_decays() -> None:
    policy = LFU(2, half_life=2.0)
    access(policy, *[0] * 6)
    # Six uses in a row are worth 4, half of it four uses later; one use is worth 1.
    assert access(policy, 1, 2, 3) == [1, 2]
    assert 0 in policy
    # After 15 more uses of others the six are worth less than one.
    assert 0 in access(policy, *range(4, 19))


def test_lfu_with_a_short_half_life_is_an_lru() -> None:
    lfu, lru = LFU(4, half_life=0.01), LRU(4)
    uses = [0, 1, 2, 3, 3, 3, 1, 4, 0, 2, 4, 5, 1, 1, 6, 0, 3]
    assert access(lfu, *uses) == access(lru, *uses) != []


def test_lfu_remembers_scores_of_the_evicted() -> None:
    policy = LFU(2, half_life=1e9)
    access(policy, 0, 0, 0, 1, 1, 1, 1)
    assert access(policy, 2) == [0]
    # 0 comes back with four uses, 2 had one.
    assert access(policy, 0) == [2]
    assert access(policy, 3) == [0]


def test_lfu_scales_its_scores_down() -> None:
    policy, plain = LFU(3, half_life=0.1), LRU(3)
    uses = [0, 1, 2, 1, 3, 0, 0, 4, 2] * 30
    # 270 uses multiply the weight by 2^900, well past the largest.
    assert LARGEST_WEIGHT**2 < 2.0**900
    assert access(policy, *uses) == access(plain, *uses)
