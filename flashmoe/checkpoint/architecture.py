"""The mlx-lm model of a config, and which of its modules are routed experts.

Routed experts are found by type (mlx-lm's `SwitchGLU` and `SwitchMLP`), never by name, so
every family that uses them is covered. Models are built lazily: nothing here allocates weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)
from mlx_lm.utils import _get_classes

from flashmoe.base.errors import SourceError
from flashmoe.checkpoint.config import (
    Config,
    fill_missing,
    missing_arguments,
    normalize,
    with_older_layer_types,
)

PROJECTION_TYPES = (SwitchLinear, QuantizedSwitchLinear)
# What mlx-lm raises for a config that makes no sense to it, or that it does not support.
REFUSALS = (TypeError, KeyError, ValueError, AttributeError, IndexError, AssertionError)
EXPERT_TYPES = (SwitchGLU, SwitchMLP)
# Records hold projections in this order, whatever order a family's module has them in.
PROJECTIONS = {SwitchGLU: ("gate_proj", "up_proj", "down_proj"), SwitchMLP: ("fc1", "fc2")}


def model_classes(config: Config) -> tuple[type[nn.Module], Any]:
    """mlx-lm's model and argument classes for a config.

    The text part of a multimodal family (`x_text`) is the family's own class. Raises
    SourceError for a model type that mlx-lm does not know.
    """
    model_type = config["model_type"]
    for candidate in (model_type, model_type.removesuffix("_text")):
        try:
            model_class, args_class = _get_classes({**config, "model_type": candidate})
        except ValueError:
            continue
        return model_class, args_class
    raise SourceError(f"the model type {model_type!r} is not known to this version of mlx-lm")


def build_model(config: Config) -> tuple[nn.Module, Config]:
    """The mlx-lm model of a config, weights unevaluated, and the config it was built from.

    The returned config is the given one plus the keys its family needs (see `config`).
    Raises SourceError for an unknown model type or a config that lacks a key.
    """
    try:
        return _build(config)
    finally:
        # Each initial weight takes a random key, a lazy function of the one before: never
        # evaluated, that chain grows with every model that is built.
        mx.eval(mx.random.state)


def _build(config: Config) -> tuple[nn.Module, Config]:
    try:
        normal = normalize(config)
        model_class, args_class = model_classes(normal)
        while True:
            try:
                return model_class(args_class.from_dict(normal)), normal
            except REFUSALS as error:
                normal = _amended(normal, error)
    except REFUSALS as error:
        raise SourceError(
            f"config.json does not describe a {config['model_type']} model: "
            f"{type(error).__name__}: {error}"
        ) from error


def _amended(config: Config, error: Exception) -> Config:
    """The config with what a family refused it for put right; raises `error` if it cannot be."""
    names = missing_arguments(error)
    if names:
        return fill_missing(config, names)
    older = with_older_layer_types(config)
    if older is None:
        raise error
    return older


def build_resident(config: Config, quantization: Mapping[str, Packing]) -> nn.Module:
    """The model of a config without its experts' projections, the modules named in
    `quantization` quantized; its parameters are what a store's resident files hold."""
    model, _ = build_model(config)
    for module in expert_modules(model).values():
        for name in projections_of(module):
            module.pop(name)

    def packing(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path not in quantization or not hasattr(module, "to_quantized"):
            return False
        wanted = quantization[path]
        return {"bits": wanted.bits, "group_size": wanted.group_size, "mode": wanted.mode}

    nn.quantize(model, class_predicate=packing)
    return model


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The routed-expert modules by dotted path, in the order the model holds them."""
    found = {
        path: module for path, module in model.named_modules() if isinstance(module, EXPERT_TYPES)
    }
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def kind_of(module: nn.Module) -> str:
    """ "SwitchGLU" or "SwitchMLP".

    Raises SourceError for a subclass that computes something else: streaming it would be wrong.
    """
    for base in EXPERT_TYPES:
        if isinstance(module, base):
            if type(module).__call__ is not base.__call__:
                raise SourceError(
                    f"{type(module).__name__} changes how {base.__name__} computes; "
                    "this version of flashmoe cannot stream it"
                )
            return str(base.__name__)
    raise TypeError(f"{type(module).__name__} is not a routed-expert module")


def projections_of(module: nn.Module) -> dict[str, nn.Module]:
    """The projections of a routed-expert module in record order."""
    names = PROJECTIONS[SwitchGLU if isinstance(module, SwitchGLU) else SwitchMLP]
    return {name: module[name] for name in names}


def n_experts_of(module: nn.Module) -> int:
    first = next(iter(projections_of(module).values()))
    return int(first["weight"].shape[0])


def extra_children(module: nn.Module) -> dict[str, Any]:
    """What a routed-expert module holds beside its projections (activation, norms): resident."""
    projections = PROJECTIONS[SwitchGLU if isinstance(module, SwitchGLU) else SwitchMLP]
    return {name: child for name, child in module.items() if name not in projections}


def replace_modules(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Put `modules` in at their dotted paths."""
    model.update_modules(tree_unflatten(list(modules.items())))


class Packing(Protocol):
    """How a module's weight is packed."""

    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def mode(self) -> str: ...


@dataclass
class Routing:
    """What a forward pass over unevaluated arrays reveals of a model.

    `top_k` per expert module path; `width` is the widest input of an expert, `vocabulary`
    the number of logits; `caches` are mlx-lm's after one token, their arrays unevaluated.
    """

    top_k: dict[str, int] = field(default_factory=dict)
    width: int = 0
    vocabulary: int = 0
    caches: list[Any] = field(default_factory=list)


class _Probe(nn.Module):
    """Stands in for a routed-expert module, notes the shapes it meets, computes nothing."""

    def __init__(self, module: nn.Module, path: str, routing: Routing) -> None:
        super().__init__()
        for name, child in extra_children(module).items():
            setattr(self, name, child)
        self._path = path
        self._routing = routing

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self._routing.top_k[self._path] = int(indices.shape[-1])
        self._routing.width = max(self._routing.width, int(x.shape[-1]))
        return mx.zeros((*indices.shape, x.shape[-1]), x.dtype)


def probe_routing(config: Config, prepare: Callable[[nn.Module], None] | None = None) -> Routing:
    """Learn top-k per layer and the caches' sizes from a forward pass of one token.

    `prepare` may change the model before that. Nothing is evaluated, so this costs graph
    building only. It runs on a model of its own, because a forward pass may leave derived
    weights behind in the module.
    """
    model, _ = build_model(config)
    modules = expert_modules(model)
    routing = Routing()
    replace_modules(model, {p: _Probe(m, p, routing) for p, m in modules.items()})
    routing.caches = make_prompt_cache(model)
    if prepare is not None:
        prepare(model)
    try:
        logits = model(mx.zeros((1, 1), mx.int32), cache=routing.caches)
    except AssertionError as error:
        name = config["model_type"]
        raise SourceError(f"mlx-lm does not support this {name} model: {error}") from error
    routing.vocabulary = int(logits.shape[-1])
    silent = next((path for path in modules if path not in routing.top_k), None)
    if silent is not None:
        raise SourceError(f"{silent} was not reached by a forward pass; its top-k is unknown")
    return routing


def _natural(path: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in path.split("."))
