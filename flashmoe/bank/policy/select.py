"""Which policies exist, and which one a name means."""

from __future__ import annotations

from flashmoe.bank.policy.clock import Clock
from flashmoe.bank.policy.contract import Policy
from flashmoe.bank.policy.lfu import LFU
from flashmoe.bank.policy.lru import LRU
from flashmoe.bank.policy.s3fifo import S3FIFO
from flashmoe.bank.policy.slru import SLRU
from flashmoe.base.errors import OptionError

AUTO = "lfu"
POLICY_NAMES = ("lru", "clock", "slru", "s3fifo", "lfu")


def resolve_policy(name: str = "auto") -> str:
    """The name of the policy that `name` stands for; raises OptionError for an unknown one."""
    chosen = AUTO if name == "auto" else name
    if chosen not in POLICY_NAMES:
        raise OptionError(f"policy must be one of {['auto', *POLICY_NAMES]}, not {name!r}")
    return chosen


def make_policy(name: str, capacity: int) -> Policy:
    """A new policy for a bank of `capacity` slots; raises OptionError for an unknown name."""
    classes: tuple[type[Policy], ...] = (LRU, Clock, SLRU, S3FIFO, LFU)
    return classes[POLICY_NAMES.index(resolve_policy(name))](capacity)
