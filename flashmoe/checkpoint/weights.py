"""Expert tensors in layouts that a family's own mlx-lm `sanitize` does not read.

Three occur in checkpoints that transformers 5 writes: one tensor per expert where the family
expects them stacked, fused float tensors `[n_experts, d_in, d_out]` where it expects
`[n_experts, d_out, d_in]` under the name `.weight`, and fused tensors under the name that
sanitize looks for but with their last two axes the other way round. Beside those, a tensor may
bear the name that its kind of layer has elsewhere in the model. Everything is lazy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from flashmoe.checkpoint.architecture import expert_modules, n_experts_of, projections_of

Weights = dict[str, mx.array]

_PER_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.(weight|bias|scales|biases)")
_FUSED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
_STACKED = re.compile(rf"\.experts\.({'|'.join(_FUSED)})$")


def adapting(model_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass of an mlx-lm model whose `sanitize` also reads those layouts.

    The family's own sanitize goes first; only when it leaves expert projections without a
    weight of their shape are other readings tried, and one that fits is taken.
    """

    def sanitize(self: nn.Module, weights: Weights) -> Weights:
        return by_parts(lambda given: sanitize_floats(self, given), weights)

    def sanitize_floats(self: nn.Module, weights: Weights) -> Weights:
        def read(candidate: Weights) -> Weights:
            inherited: Any = getattr(super(adapted, self), "sanitize", dict)
            return place_strays(self, stack_experts(self, inherited(dict(candidate))))

        result = read(weights)
        if _fits(self, result):
            return result
        for other in (turn_fused(self, weights), swap_fused(weights)):
            if other is not None:
                candidate = read(other)
                if _fits(self, candidate):
                    return candidate
        return result

    adapted = type(model_class.__name__, (model_class,), {"sanitize": sanitize})
    return adapted


def by_parts(sanitize: Callable[[Weights], Weights], weights: Weights) -> Weights:
    """What `sanitize` makes of weights, of which MLX's packed ones may have names that it knows for
    `.weight` alone: if it leaves their scales behind, these go through it under that name."""
    result = sanitize(dict(weights))
    if _are_together(result):
        return result
    paths = {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}
    paths = {path for path in paths if _is_packed(weights.get(f"{path}.weight"))}
    if not paths:
        return result
    parts = ("weight", "scales", "biases")
    own = {f"{path}.{part}" for path in paths for part in parts}
    others = {name: array for name, array in weights.items() if name not in own}

    def passed(part: str) -> Weights:
        renamed = {f"{path}.weight": weights.get(f"{path}.{part}") for path in paths}
        return sanitize(
            {**others, **{n: array for n, array in renamed.items() if array is not None}}
        )

    result = passed("weight")
    homes = [n for n, array in result.items() if n.endswith(".weight") and _is_packed(array)]
    for part in parts[1:]:
        found = passed(part)
        for name in homes:
            if name in found and not _is_packed(found[name]):
                result[name.removesuffix("weight") + part] = found[name]
    return result


def _are_together(weights: Weights) -> bool:
    """Whether packed weights have their scales beside them, and scales their weights."""
    packed = {
        name.removesuffix(".weight")
        for name, array in weights.items()
        if name.endswith(".weight") and _is_packed(array)
    }
    return packed == {n.removesuffix(".scales") for n in weights if n.endswith(".scales")}


def _is_packed(array: mx.array | None) -> bool:
    return array is not None and array.dtype == mx.uint32


def stack_experts(model: nn.Module, weights: Weights) -> Weights:
    """Stack per-expert tensors that sanitize left alone into their expert module's tensors.

    Experts past the module's number of them are dropped: routing to one is routing to nothing.
    """
    homes = {path.rpartition(".")[0]: (path, n_experts_of(m)) for path, m in _experts(model)}
    left: dict[str, dict[int, mx.array]] = {}
    for name in list(weights):
        match = _PER_EXPERT.fullmatch(name)
        if match is None or match[1] not in homes:
            continue
        path, n_experts = homes[match[1]]
        tensor, expert = weights.pop(name), int(match[2])
        if expert < n_experts:
            left.setdefault(f"{path}.{match[3]}.{match[4]}", {})[expert] = tensor
    for target, experts in left.items():
        weights[target] = mx.stack([experts[i] for i in sorted(experts)])
    return weights


def place_strays(model: nn.Module, weights: Weights) -> Weights:
    """Rename each tensor that the model has no place for, if exactly one parameter lacks a tensor
    and has its shape and its path but for the name of one module that encloses it.

    transformers writes dense layers under the name of MoE blocks where it renames the latter.
    """
    wanted = dict(tree_flatten(model.parameters()))
    strays = [name for name in weights if name not in wanted]
    gaps = [name for name in wanted if name not in weights]
    for stray in strays:
        fitting = [
            gap
            for gap in gaps
            if wanted[gap].shape == weights[stray].shape and _differ_in_one_module(stray, gap)
        ]
        if len(fitting) == 1:
            gaps.remove(fitting[0])
            weights[fitting[0]] = weights.pop(stray)
    return weights


def _differ_in_one_module(path: str, other: str) -> bool:
    pairs = list(zip(path.split("."), other.split("."), strict=False))
    differing = [i for i, (a, b) in enumerate(pairs) if a != b]
    if path.count(".") != other.count(".") or len(differing) != 1:
        return False
    # The last two are the layer and its parameter; a number is an index, not a name.
    return differing[0] < len(pairs) - 2 and not any(x.isdigit() for x in pairs[differing[0]])


def turn_fused(model: nn.Module, weights: Weights) -> Weights | None:
    """The weights with bare fused expert tensors as `[n_experts, d_out, d_in]` and named
    `.weight`, or None when there are none at the paths of expert modules."""
    turned = dict(weights)
    found = False
    for path, module in _experts(model):
        names = [f"{path}.{part}" for part in _FUSED if f"{path}.{part}" in weights]
        if any(weights[name].ndim != 3 for name in names):
            continue
        swap = not _is_row_major(module, path, weights)
        for name in names:
            tensor = turned.pop(name)
            turned[f"{name}.weight"] = tensor.swapaxes(-1, -2) if swap else tensor
            found = True
    return turned if found else None


def swap_fused(weights: Weights) -> Weights | None:
    """The weights with the last two axes of every fused expert tensor swapped, or None when
    there are none."""
    fused = {name: w for name, w in weights.items() if _STACKED.search(name) and w.ndim == 3}
    if not fused:
        return None
    return {**weights, **{name: w.swapaxes(-1, -2) for name, w in fused.items()}}


def _is_row_major(module: nn.Module, path: str, weights: Weights) -> bool:
    """Whether the fused tensors are [n_experts, d_out, d_in]; a square one cannot tell."""
    _, hidden, d_in = next(iter(projections_of(module).values()))["weight"].shape
    fused = weights.get(f"{path}.gate_up_proj")
    if fused is None or d_in == 2 * hidden:
        return False
    return tuple(fused.shape[1:]) == (2 * hidden, d_in)


def _fits(model: nn.Module, weights: Weights) -> bool:
    """Whether each expert projection has a weight, and of its shape (quantized ones have not)."""
    for path, module in _experts(model):
        for name, projection in projections_of(module).items():
            weight = weights.get(f"{path}.{name}.weight")
            if weight is None or weight.shape != projection["weight"].shape:
                return False
    return True


def _experts(model: nn.Module) -> ItemsView[str, nn.Module]:
    return expert_modules(model).items()
