"""Recording which experts a model's tokens are routed to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from trace_file import Routed, TracedLayer, TraceWriter, read_trace

from flashmoe.base.errors import FlashMoEError, OptionError, PromptError, SourceError
from flashmoe.engine.api import FlashMoEModel
from flashmoe.generation.session import Sampling


@dataclass(frozen=True)
class TraceSummary:
    """What was recorded: `tokens` were fed to the model, `prompt_tokens` of them from prompts.

    `accesses` counts routed experts over all tokens and layers.
    """

    trace: str
    prompts: int
    tokens: int
    prompt_tokens: int
    layers: int
    accesses: int
    file_bytes: int


class RoutingRecorder:
    """Collects what the layers say in one forward pass and writes it as one step."""

    def __init__(self, writer: TraceWriter, n_layers: int) -> None:
        self.prompt = 0
        self.tokens = 0
        self._writer = writer
        self._step: list[Routed | None] = [None] * n_layers

    def observe(self, layer: int, experts: npt.NDArray[Any]) -> None:
        """One layer's routed experts [..., top_k] of a pass.

        Raises FlashMoEError when a pass does not come by every layer once with the same tokens.
        """
        rows = experts.reshape(-1, experts.shape[-1]).astype(np.uint16)
        if self._step[layer] is not None:
            raise _uneven()
        self._step[layer] = rows
        parts = [part for part in self._step if part is not None]
        if len(parts) < len(self._step):
            return
        if any(len(part) != len(rows) for part in parts):
            raise _uneven()
        self._writer.add_step(self.prompt, np.concatenate(parts, axis=1))
        self.tokens += len(rows)
        self._step = [None] * len(self._step)


def record_routing(
    model: FlashMoEModel,
    prompts: Sequence[str],
    out: Path,
    *,
    max_tokens: int,
    sampling: Sampling,
    template: bool = True,
) -> TraceSummary:
    """Answer every prompt in a conversation of its own and write the routing to `out`.

    A sampling seed is that of the first prompt; each later one takes the next. Raises
    PromptError, naming the prompt, OptionError when `out` is something else than an earlier
    trace, and OSError; no file is left then.
    """
    if not prompts:
        raise PromptError("there are no prompts to trace")
    _check_replaceable(out)
    manifest = model.store.manifest
    layers = [
        TracedLayer(layer.path, layer.n_experts, layer.top_k, layer.record.stride)
        for layer in model.plan.facts.layers
    ]
    before = model.totals()
    with TraceWriter(out, manifest.model_type, layers) as writer:
        recorder = RoutingRecorder(writer, len(layers))
        model.observe_routing(recorder.observe)
        try:
            for number, prompt in enumerate(prompts):
                recorder.prompt = number
                _answer(model, number, prompt, max_tokens, sampling, template)
        finally:
            model.observe_routing(None)
        writer.finish()
    return TraceSummary(
        trace=str(out),
        prompts=len(prompts),
        tokens=recorder.tokens,
        prompt_tokens=model.totals().since(before).prompt_tokens,
        layers=len(layers),
        accesses=recorder.tokens * sum(layer.top_k for layer in layers),
        file_bytes=out.stat().st_size,
    )


def _answer(
    model: FlashMoEModel,
    number: int,
    prompt: str,
    max_tokens: int,
    sampling: Sampling,
    template: bool,
) -> None:
    if sampling.seed is not None:
        sampling = replace(sampling, seed=(sampling.seed + number) % 2**64)
    try:
        for _ in model.session().stream(
            prompt, max_new_tokens=max_tokens, sampling=sampling, template=template
        ):
            pass
    except PromptError as error:
        raise PromptError(f"prompt {number + 1}: {error}") from error


def _check_replaceable(out: Path) -> None:
    """Prompts, say, named in the wrong place must not be overwritten."""
    if not out.exists():
        return
    try:
        read_trace(out)
    except SourceError as error:
        raise OptionError(f"{out} exists and is no trace; name another file to write") from error


def _uneven() -> FlashMoEError:
    return FlashMoEError(
        "this model's MoE layers are not called once each per forward pass, "
        "so its routing cannot be traced"
    )
