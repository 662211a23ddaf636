"""What sets each policy apart, on sequences made by hand."""

from flashmoe.bank.eviction import LARGEST_WEIGHT, LFU, LRU, Policy


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


def test_lru_does_not_survive_a_scan() -> None:
    policy = LRU(10)
    access(policy, *[1, 2, 3, 4] * 4, *range(100, 140))
    assert sorted(evict_all(policy)) == list(range(130, 140))


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
