"""What the next step takes, as said before, against what mlx-lm's caches then take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flashmoe
from flashmoe import FlashMoEModel
from flashmoe.base.clock import PhaseClock
from flashmoe.generation.token_state import TokenState
from flashmoe.store.reader import open_store
from tests.support.families import save_checkpoint
from tests.support.scripted import VOCABULARY
from tests.support.sessions import resident_model

# KV caches, sliding windows, recurrent states beside attention, latent attention.
KINDS = ["qwen3_moe", "gpt_oss", "qwen3_next", "deepseek_v3", "nemotron_h"]


def ids(count: int) -> list[int]:
    return [(7 * i + 3) % VOCABULARY for i in range(count)]


def test_steps_are_announced() -> None:
    told: list[tuple[int, int, int]] = []

    def before(known: int, new: int, held: Callable[[], int]) -> None:
        told.append((known, new, held()))

    state = TokenState(resident_model("qwen3_moe"), PhaseClock(), 100, before)
    state.feed(ids(250))
    one_step = told[1][2]
    assert [call[:2] for call in told] == [(0, 100), (100, 100), (200, 49), (249, 1)]
    assert told[0][2] == 0 < one_step
    assert told[2][2] == told[3][2] == one_step == state.held_bytes()
    # Past 256 tokens there is another step of them.
    for token in ids(8):
        state.feed([token])
    assert state.held_bytes() == 2 * one_step
    assert told[-1] == (257, 1, 2 * one_step)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp(request.param)
    save_checkpoint(folder / "checkpoint", request.param)
    store = flashmoe.repack(folder / "checkpoint", folder / "store")
    with FlashMoEModel(open_store(store.path), memory="3GB") as loaded:
        yield loaded


def test_what_is_coming_covers_what_comes(model: FlashMoEModel) -> None:
    """Caches never grow by more than was said, over prompts and answers of odd lengths."""
    governor = model._running.governor
    assert governor is not None
    announced: list[tuple[int, int]] = []

    def before(known: int, new: int, held: Callable[[], int]) -> None:
        announced.append((governor._coming(known, new, held()), held()))

    chunk = model.memory_plan.prompts.chunk_tokens
    state = TokenState(model.model, PhaseClock(), chunk, before)
    fed: list[int] = []
    for count in (1, 1, 254, 3, 300, 30, 513, 1):
        announced.clear()
        state.feed(ids(count))
        fed.append(state.held_bytes())
        for (coming, held), after in zip(
            announced, [held for _, held in announced[1:]] + [fed[-1]], strict=True
        ):
            assert after - held <= coming
    # Where caches have room, it is scratch alone that comes.
    known = len(state.ids)
    assert governor._coming(known, 1, 10 * fed[-1]) < governor._coming(known, 1, 0) - fed[-1] // 2
