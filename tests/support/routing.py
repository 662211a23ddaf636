"""What a model's routers choose, seen from the experts' place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from flashmoe.checkpoint.architecture import replace_modules
from flashmoe.model.predictor import Predictor

# The families whose experts cannot be prefetch, and why.
WITHOUT = {
    "gemma4": "the router is beside the experts' block and has a norm of its own",
    "gemma4_text": "the router is beside the experts' block and has a norm of its own",
    "kimi_k3": "the experts are given a projection of what the router is given",
    "longcat_flash": "the router also chooses experts that compute nothing",
    "longcat_flash_ngram": "the router also chooses experts that compute nothing",
    "nemotron_h": "the experts are given a projection of what the router is given",
}

Step = tuple[mx.array, npt.NDArray[Any]]


class Observer(nn.Module):
    """Stands in for an expert module and calls it; notes a single token's input and indices."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self._experts = experts
        self.steps: list[Step] = []

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        if indices.size == indices.shape[-1]:
            mx.eval(x)
            self.steps.append((x, np.array(indices).reshape(-1)))
        made: mx.array = self._experts(x, indices)
        return made


def observe(model: nn.Module, experts: dict[str, nn.Module]) -> list[list[Step]]:
    """Per expert module, the list that its steps will be in."""
    observers = {path: Observer(module) for path, module in experts.items()}
    replace_modules(model, dict(observers))
    return [observer.steps for observer in observers.values()]


def recalls(
    predictors: Sequence[Predictor | None], steps: list[list[Step]], times: int = 1
) -> list[float]:
    """Per pair of layers with a predictor, the share of the routed experts that are among the
    `times` as many prefetched ones."""
    return [
        float(
            np.mean(
                [
                    np.isin(after, np.array(predictor(x, times * predictor.top_k))).mean()
                    for (x, _), (_, after) in zip(here, then, strict=True)
                ]
            )
        )
        for predictor, here, then in zip(predictors, steps, [*steps[1:], []], strict=True)
        if predictor is not None
    ]
