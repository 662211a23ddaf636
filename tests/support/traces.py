"""Traces made up for tests."""

from pathlib import Path

import numpy as np

from flashmoe.bench.trace_file import Trace, TracedLayer, TraceWriter, read_trace

LAYERS = (TracedLayer("layers.0", 8, 2, 4096), TracedLayer("layers.1", 6, 3, 8192))
# (prompt, tokens) of each step.
STEPS = ((0, 4), (0, 1), (0, 1), (1, 3), (1, 1))
TOKENS = 10


def drawn_experts(seed: int = 0) -> np.ndarray:
    """Routed experts [TOKENS, 5] of both layers."""
    draw = np.random.default_rng(seed)
    columns = [
        [draw.permutation(layer.n_experts)[: layer.top_k] for _ in range(TOKENS)]
        for layer in LAYERS
    ]
    return np.concatenate(columns, axis=1).astype(np.uint16)


def write_trace(path: Path, seed: int = 0) -> np.ndarray:
    """A trace of two layers; returns its experts."""
    experts = drawn_experts(seed)
    with TraceWriter(path, "tiny", LAYERS) as writer:
        first = 0
        for prompt, count in STEPS:
            writer.add_step(prompt, experts[first : first + count])
            first += count
        writer.finish()
    return experts


def drawn_trace(path: Path, seed: int = 0) -> Trace:
    write_trace(path, seed)
    return read_trace(path)
