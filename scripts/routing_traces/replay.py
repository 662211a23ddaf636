"""A trace's accesses as a bank sees them, and what a policy makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from trace_file import Trace

from flashmoe.bank.eviction import Policy


def layer_steps(trace: Trace, layer: int, *, decode_only: bool = False) -> list[list[int]]:
    """What one layer's bank is asked for, call by call.

    A token that is fed alone asks for its experts at once. A chunk of a prompt is walked in disk
    order, top_k experts at a time, as it is where memory leaves no staging to prefill it through;
    `decode_only` leaves such chunks out.
    """
    routed = trace.routed(layer)
    top_k = trace.layers[layer].top_k
    steps: list[list[int]] = []
    first = 0
    for count in trace.step_tokens.tolist():
        rows = routed[first : first + count]
        first += count
        if count > 1 and decode_only:
            continue
        distinct = np.unique(rows).tolist()
        steps += [distinct[i : i + top_k] for i in range(0, len(distinct), top_k)]
    return steps


def replay(steps: Sequence[Sequence[int]], policy: Policy) -> int:
    """Hits of an empty bank with this policy, which is new and has its number of slots."""
    hits = 0
    for step in steps:
        missing = sum(expert not in policy for expert in step)
        hits += len(step) - missing
        surplus = len(policy) + missing - policy.capacity
        if surplus > 0:
            pinned = set(step)
            for _ in range(surplus):
                policy.victim(pinned)
        for expert in step:
            policy.use(expert)
    return hits
