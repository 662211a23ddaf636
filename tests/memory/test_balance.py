"""Which layer gets how many slots, learnt while tokens are fed: rarely, and where it pays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from flashmoe.memory.balance import LEARN_TOKENS, PAY_TOKENS, Balance, is_worth_moving
from flashmoe.memory.budget import LayerDemand, share_slots
from flashmoe.memory.hit_curves import use_hit_curve

MB = 10**6
DEMANDS = [LayerDemand(MB, 2, 10)] * 2
# One layer uses two of its experts, the other all of them alike.
FEW = [4000, 4000, 0, 0, 0, 0, 0, 0, 0, 0]
ALL = [800] * 10


class Fed:
    """Counters of two layers, and a balance that reads them."""

    def __init__(self, *layers: list[int]) -> None:
        self.uses: list[npt.NDArray[np.int64]] = [np.array(layer, np.int64) for layer in layers]
        self.balance = Balance(DEMANDS, lambda: self.uses)

    def tokens(self, count: int) -> None:
        for _ in range(count):
            self.balance.count_token()


def test_equal_until_something_is_known() -> None:
    fed = Fed(FEW, ALL)
    assert fed.balance.share(12 * MB) == share_slots(DEMANDS, 12 * MB) == (6, 6)
    fed.tokens(LEARN_TOKENS - 1)
    assert not fed.balance.learn((6, 6))
    assert fed.balance.share(12 * MB) == (6, 6)
    assert fed.uses[0][0] == 4000


def test_slots_go_where_they_are_used() -> None:
    fed = Fed(FEW, ALL)
    fed.tokens(LEARN_TOKENS)
    assert fed.balance.learn((6, 6))
    assert fed.balance.share(12 * MB) == (2, 10)
    assert fed.balance.share(9 * MB) == (2, 7)
    # What was seen counts half when the next is looked at.
    assert fed.uses[0].tolist() == [2000, 2000, 0, 0, 0, 0, 0, 0, 0, 0]
    assert not fed.balance.learn((2, 10))


def test_needs_change() -> None:
    fed = Fed(FEW, ALL)
    fed.tokens(LEARN_TOKENS)
    fed.balance.learn((6, 6))
    fed.uses[:] = [np.array(ALL, np.int64), np.array(FEW, np.int64)]
    fed.tokens(LEARN_TOKENS)
    assert fed.balance.learn((2, 10))
    assert fed.balance.share(12 * MB) == (10, 2)


def test_never_below_one_tokens_needs() -> None:
    fed = Fed([9000] + [0] * 9, ALL)
    fed.tokens(LEARN_TOKENS)
    assert fed.balance.learn((4, 4))
    assert fed.balance.share(8 * MB) == (2, 6)


def test_noise_is_no_need() -> None:
    rng = np.random.default_rng(0)
    fed = Fed(*[(800 + rng.integers(0, 20, 10)).tolist() for _ in range(2)])
    fed.tokens(LEARN_TOKENS)
    assert not fed.balance.learn((6, 6))
    assert fed.balance.share(12 * MB) == (6, 6)


@pytest.mark.parametrize(("gain", "worth"), [(2, False), (4, True)])
def test_what_moves_has_to_be_read_again(gain: int, worth: bool) -> None:
    """One record moves; over so many tokens it saves `gain` reads of 100 in all."""
    curves = [use_hit_curve(np.array(uses)) for uses in ([40, 10, 10 - gain], [20, 10, 10])]
    n_tokens = 3 * PAY_TOKENS
    demands = [LayerDemand(MB, 1, 3)] * 2
    assert is_worth_moving(curves, demands, (3, 2), (2, 3), n_tokens) == worth
    assert not is_worth_moving(curves, demands, (3, 2), (3, 2), n_tokens)
