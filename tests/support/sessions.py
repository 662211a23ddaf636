"""Sessions over tiny resident models, and the tokens that they answer."""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest

from flashmoe.generation.report import Ledger
from flashmoe.generation.session import Piece, Session
from tests.support.families import FAMILIES, build_model
from tests.support.scripted import VOCABULARY, Words


@cache
def resident_model(family: str, **changes: Any) -> nn.Module:
    """The family's model with these changes to its config, built once."""
    return build_model({**FAMILIES[family], **changes}, seed=0)


def session_of(
    model: nn.Module,
    *,
    context: int = 512,
    chunk: int = 5,
    stop: Sequence[int] = (),
    ledger: Ledger | None = None,
) -> Session:
    return Session(model, Words(stop), ledger or Ledger(), context=context, chunk=chunk)


def tokens(pieces: Iterable[Piece]) -> list[int]:
    return [piece.token for piece in pieces if piece.token is not None]


def answer(session: Session, ids: Sequence[int], count: int = 6, **options: Any) -> list[int]:
    return tokens(session.stream(ids, max_new_tokens=count, **options))


def draw(seed: int, count: int) -> list[int]:
    """Random token ids."""
    ids: list[int] = np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()
    return ids


def watch_passes(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of tokens of each forward pass."""
    fed: list[int] = []
    original = type(model).__call__

    def counting(self: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        fed.append(inputs.shape[1])
        return original(self, inputs, *args, **kwargs)

    monkeypatch.setattr(type(model), "__call__", counting)
    return fed
