"""Which parts of streaming are on: all of them, but where it is measured what each one brings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parts:
    """Parts of the engine that can be left out; no result depends on them.

    routed: read what a token is routed to, and not every record of each layer, one by one.
    bank: keep as many experts as memory holds, and not just one token's needs.
    overlap: compute experts that are there while others are read. Without it nothing is read
    ahead either.
    """

    routed: bool = True
    bank: bool = True
    overlap: bool = True


ALL_PARTS = Parts()
