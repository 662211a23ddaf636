"""Expert tensors in layouts that a family's own mlx-lm `sanitize` does not read.

Two occur in checkpoints that transformers 5 writes: one tensor per expert where the family
expects them stacked, and fused float tensors `[n_experts, d_in, d_out]` where it expects
`[n_experts, d_out, d_in]` under the name `.weight`. Everything is lazy.
"""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flashmoe.checkpoint.architecture import expert_modules, projections_of

Weights = dict[str, mx.array]

_PER_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.(weight|bias|scales|biases)")
_FUSED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


def adapting(model_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass of an mlx-lm model whose `sanitize` also reads those layouts.

    The family's own sanitize goes first; only when it leaves expert projections without a
    weight is another reading tried.
    """

    def sanitize(self: nn.Module, weights: Weights) -> Weights:
        def read(candidate: Weights) -> Weights:
            inherited: Any = getattr(super(adapted, self), "sanitize", dict)
            return stack_experts(self, inherited(dict(candidate)))

        result = read(weights)
        if not _complete(self, result):
            turned = turn_fused(self, weights)
            if turned is not None:
                result = read(turned)
        return result

    adapted = type(model_class.__name__, (model_class,), {"sanitize": sanitize})
    return adapted


def stack_experts(model: nn.Module, weights: Weights) -> Weights:
    """Stack per-expert tensors that sanitize left alone into their expert module's tensors."""
    homes: dict[str, str] = {}
    for path in expert_modules(model):
        homes[path.rpartition(".")[0]] = path
    left: dict[str, dict[int, mx.array]] = {}
    for name in list(weights):
        match = _PER_EXPERT.fullmatch(name)
        if match is not None and match[1] in homes:
            target = f"{homes[match[1]]}.{match[3]}.{match[4]}"
            left.setdefault(target, {})[int(match[2])] = weights.pop(name)
    for target, experts in left.items():
        weights[target] = mx.stack([experts[i] for i in sorted(experts)])
    return weights


def turn_fused(model: nn.Module, weights: Weights) -> Weights | None:
    """The weights with bare fused expert tensors as `[n_experts, d_out, d_in]` and named
    `.weight`, or None when there are none at the paths of expert modules."""
    turned = dict(weights)
    found = False
    for path, module in expert_modules(model).items():
        names = [f"{path}.{part}" for part in _FUSED if f"{path}.{part}" in weights]
        if any(weights[name].ndim != 3 for name in names):
            continue
        swap = not _is_row_major(module, path, weights)
        for name in names:
            tensor = turned.pop(name)
            turned[f"{name}.weight"] = tensor.swapaxes(-1, -2) if swap else tensor
            found = True
    return turned if found else None


def _is_row_major(module: nn.Module, path: str, weights: Weights) -> bool:
    """Whether the fused tensors are [n_experts, d_out, d_in]; a square one cannot tell."""
    _, hidden, d_in = next(iter(projections_of(module).values()))["weight"].shape
    fused = weights.get(f"{path}.gate_up_proj")
    if fused is None or d_in == 2 * hidden:
        return False
    return tuple(fused.shape[1:]) == (2 * hidden, d_in)


def _complete(model: nn.Module, weights: Weights) -> bool:
    return all(
        f"{path}.{name}.weight" in weights
        for path, module in expert_modules(model).items()
        for name in projections_of(module)
    )
