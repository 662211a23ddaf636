"""Slots shared out over layers by what they were seen to need, while the model runs.

Counters tell how many of its experts each layer really uses; layers that use few give slots to
those that use many. That moves records, so it is done rarely, and only where it pays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from flashmoe.memory.budget import LayerDemand, share_slots
from flashmoe.memory.hit_curves import HitCurve, share_by_need, use_hit_curve

Uses = Sequence[npt.NDArray[np.int64]]

# Single tokens between two looks at the counters, which count half from then on.
LEARN_TOKENS = 512
# What is moved has to be read again; it must have paid for itself after so many tokens.
PAY_TOKENS = 1024
# Of what tokens demand, the least that must be saved: less is noise.
LEAST_GAIN = 1 / 200


class Balance:
    """How many slots each layer gets of a budget: equally many, until some are seen to need more.

    `uses()` are the counters of each layer: how often each expert was used by single tokens.
    """

    def __init__(self, demands: Sequence[LayerDemand], uses: Callable[[], Uses]) -> None:
        self._demands = demands
        self._uses = uses
        self._curves: list[HitCurve] | None = None
        self._n_new = 0
        # That the counters stand for.
        self._n_tokens = 0

    def share(self, bank_bytes: int) -> tuple[int, ...]:
        """Slots per layer within `bank_bytes`; raises what `share_slots` raises."""
        if self._curves is None:
            return share_slots(self._demands, bank_bytes)
        return share_by_need(self._curves, self._demands, bank_bytes)

    def count_token(self) -> None:
        """Note that a single token was fed."""
        self._n_new += 1

    def learn(self, slots: Sequence[int]) -> bool:
        """Look at the counters, when there is enough new in them; `slots` are what layers have.
        True when `share` gives other counts from now on."""
        if self._n_new < LEARN_TOKENS:
            return False
        self._n_tokens += self._n_new
        self._n_new = 0
        uses = self._uses()
        curves = [use_hit_curve(counts) for counts in uses]
        pairs = zip(slots, self._demands, strict=True)
        bank_bytes = sum(n * demand.slot_bytes for n, demand in pairs)
        wanted = share_by_need(curves, self._demands, bank_bytes)
        pays = is_worth_moving(curves, self._demands, slots, wanted, self._n_tokens)
        if pays:
            self._curves = curves
        for counts in uses:
            counts //= 2
        self._n_tokens //= 2
        return pays


def is_worth_moving(
    curves: Sequence[HitCurve],
    demands: Sequence[LayerDemand],
    before: Sequence[int],
    after: Sequence[int],
    n_tokens: int,
) -> bool:
    """Whether other slots save enough of reading, by curves over `n_tokens`: some of all that
    was demanded, and more than the records that growing layers have to read first."""
    moved = saved = demanded = 0
    for curve, demand, old, new in zip(curves, demands, before, after, strict=True):
        moved += max(new - old, 0) * demand.slot_bytes
        saved += int(curve[new] - curve[old]) * demand.slot_bytes
        demanded += int(curve[-1]) * demand.slot_bytes
    return saved > LEAST_GAIN * demanded and saved * PAY_TOKENS > moved * n_tokens
