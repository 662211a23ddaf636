"""How many of a layer's routed experts are guessed from the layer before it.

    python scripts/forecast_recall.py [MODEL] [--tokens 32]

Answers the questions of `flashmoe bench resident` greedily, every expert in the bank if it fits,
and asks each layer's forecaster at every decoded token. Recall is the share of the next layer's
routed experts that are among the guessed ones: as many as are routed, and twice as many. `same`
guesses what the next layer chose for the token before, `chance` is what a blind guess would have.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from flashmoe import FlashMoEModel
from flashmoe.bench.prompts import QUESTIONS
from flashmoe.checkpoint.architecture import replace_modules
from flashmoe.checkpoint.config import read_config
from flashmoe.model.predictor import find_forecasters
from flashmoe.streaming.experts import StreamedExperts


class Observer(nn.Module):
    """In a streamed layer's place: notes a single token's expert input and indices."""

    def __init__(self, layer: StreamedExperts) -> None:
        super().__init__()
        self._layer = layer
        self.seen: list[tuple[mx.array, npt.NDArray[Any]]] = []

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        if indices.size == indices.shape[-1]:
            mx.eval(x)
            self.seen.append((x, np.array(indices).reshape(-1)))
        return self._layer(x, indices)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    with FlashMoEModel.from_pretrained(options.model) as model:
        forecasters = find_forecasters(model.model, read_config(model.store.path))
        layers = {
            path: module
            for path, module in model.model.named_modules()
            if isinstance(module, StreamedExperts)
        }
        paths = [layer.layout.path for layer in model.store.manifest.layers]
        observers = {path: Observer(layers[path]) for path in paths}
        replace_modules(model.model, observers)
        session = model.session()
        for prompt in QUESTIONS:
            for _ in session.stream(prompt, max_new_tokens=options.tokens):
                pass
        report(forecasters, [observers[path].seen for path in paths])


def report(forecasters: tuple[Any, ...], seen: list[Any]) -> None:
    print("layer  tokens  top-k  recall at k  at 2k  same at k  chance  microseconds")
    totals = []
    for number, forecaster in enumerate(forecasters):
        if forecaster is None:
            continue
        k = forecaster.top_k
        pairs = list(zip(seen[number], seen[number + 1], strict=True))
        started = time.perf_counter()
        guesses = [np.array(forecaster(x, 2 * k)) for (x, _), _ in pairs]
        microseconds = (time.perf_counter() - started) / len(pairs) * 1e6
        chosen = [indices for _, (_, indices) in pairs]
        row = [
            share([guess[:k] for guess in guesses], chosen),
            share(guesses, chosen),
            share(chosen[:-1], chosen[1:]),
            k / forecaster.n_experts,
        ]
        totals.append(row)
        print(number, len(pairs), k, *(f"{value:.3f}" for value in row), f"{microseconds:.0f}")
    print("mean", *(f"{value:.3f}" for value in np.mean(totals, axis=0)))


def share(guesses: list[Any], chosen: list[Any]) -> float:
    """Of the chosen, those that are among the guesses."""
    found = [np.isin(c, g).mean() for g, c in zip(guesses, chosen, strict=True)]
    return float(np.mean(found))


if __name__ == "__main__":
    main()
