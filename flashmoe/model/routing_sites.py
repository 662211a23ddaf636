"""Where a model's routers are and how they choose, found by dataflow and by trying.

A forward pass over unevaluated arrays shows which module's output becomes the input of each
block of experts. Each block is then called alone, its router's weights drawn at random, and
the experts it chooses are compared with those of every known way of scoring. Both happen in a
model made for it, so the one that is served is not touched; only a router's product and what
reaches the experts is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from flashmoe.checkpoint.architecture import (
    REFUSALS,
    build_model,
    expert_modules,
    n_experts_of,
)
from flashmoe.checkpoint.config import Config
from flashmoe.model.router_scoring import (
    Scoring,
    grouped_scorings,
    logits_of,
    plain_scorings,
    top,
)

# Tokens that a block is tried on.
_ROWS = 64
# The share of a block's choices that a scoring has to explain: rounding may swap two experts.
_EXACT = 0.99
# A router that nothing explains fully (soft-capped logits, say) is prefetched by what comes close.
_CLOSE = 0.75


@dataclass(frozen=True)
class RouterChoice:
    """How one block chooses: dotted paths within it, and the scoring.

    `scaled` says that its experts are given its input times a positive number per token.
    """

    router: str
    bias: str | None
    scoring: Scoring
    scaled: bool


@dataclass(frozen=True)
class Site:
    """The router of one layer: dotted paths of the module whose output its block is given, of
    the router and of its selection bias."""

    norm: str
    router: str
    bias: str | None
    scoring: Scoring
    scaled: bool
    top_k: int
    n_experts: int


@dataclass
class _Seen:
    """What a forward pass showed: what each small module `made` of one array, what each block
    was `given`, and the input and indices that `reached` each expert module, in call order.

    The arrays themselves are kept, so that their identity means something.
    """

    made: list[tuple[str, Any]] = field(default_factory=list)
    given: list[tuple[str, Any]] = field(default_factory=list)
    reached: list[tuple[str, mx.array, mx.array]] = field(default_factory=list)


class _Watch:
    """Notes what happens in a model from now on."""

    def __init__(self) -> None:
        self.seen = _Seen()

    def take(self) -> _Seen:
        """What was seen since it was last taken."""
        seen, self.seen = self.seen, _Seen()
        return seen


def find_sites(config: Config) -> dict[str, Site | None]:
    """Per routed-expert module, by dotted path and in the model's order: its router's site, or
    None where the router is not found or is fed otherwise than the experts.

    All are None unless each module runs once per token, in this order.
    """
    model, _ = build_model(config)
    experts = expert_modules(model)
    modules = dict(model.named_modules())
    blocks = {path: _block_of(path, experts, modules) for path in experts}
    watch = _watch_blocks(model, experts, {block for block in blocks.values() if block})
    model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model))
    seen = watch.take()
    if [path for path, _, _ in seen.reached] != list(experts):
        return dict.fromkeys(experts)
    choices: dict[Any, RouterChoice | None] = {}
    sites: dict[str, Site | None] = dict.fromkeys(experts)
    for path, _, indices in seen.reached:
        block = blocks[path]
        found = _norm_before(block, seen) if block else None
        if block is None or found is None:
            continue
        norm, width = found
        top_k, n_experts = int(indices.shape[-1]), n_experts_of(experts[path])
        shapes = tuple((name, tuple(a.shape)) for name, a in _parameters(modules[block]))
        # Blocks that are built alike choose alike.
        key = (type(modules[block]).__mro__[1], path.removeprefix(block), top_k, shapes)
        if key not in choices:
            choices[key] = _choice_of(modules[block], path, width, n_experts, watch)
        sites[path] = _site(norm, block, choices[key], top_k, n_experts)
    return sites


def _site(
    norm: str, block: str, choice: RouterChoice | None, top_k: int, n_experts: int
) -> Site | None:
    if choice is None:
        return None

    def at(name: str) -> str:
        return f"{block}.{name}" if name else block

    bias = None if choice.bias is None else at(choice.bias)
    router = at(choice.router)
    return Site(norm, router, bias, choice.scoring, choice.scaled, top_k, n_experts)


def _block_of(
    path: str, experts: dict[str, nn.Module], modules: dict[str, nn.Module]
) -> str | None:
    """The innermost module around these experts, and no others, that may hold their router."""
    n_experts = n_experts_of(experts[path])
    inside, block = path, path.rpartition(".")[0]
    while block:
        if sum(other.startswith(block + ".") for other in experts) > 1:
            return None
        # A path may also lead through lists, which are no modules.
        if block in modules:
            names = (name for name, _ in _weights(modules[block], n_experts))
            if any(not f"{block}.{name}".startswith(inside + ".") for name in names):
                return block
            inside = block
        block = block.rpartition(".")[0]
    return None


def _weights(block: nn.Module, n_experts: int) -> Iterator[tuple[str, mx.array]]:
    for name, array in _parameters(block):
        matrix = array.ndim == 2 and array.shape[0] == n_experts
        if matrix and name.rpartition(".")[2] == "weight":
            yield name, array


def _parameters(module: nn.Module) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(module.parameters())
    return list(flat)


def _wrap(module: nn.Module, around: Callable[..., Any]) -> None:
    """From now on `module(...)` is `around(call, ...)`, `call` being what it was."""
    kind = type(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(lambda: kind.__call__(self, *args, **kwargs), *args, **kwargs)

    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def _watch_blocks(model: nn.Module, experts: dict[str, nn.Module], blocks: set[str]) -> _Watch:
    """Watch what may be a norm, the blocks, and the experts, which compute nothing any more."""
    watch = _Watch()

    def at_experts(path: str, call: Any, x: mx.array, indices: mx.array) -> mx.array:
        watch.seen.reached.append((path, x, indices))
        return mx.zeros((*indices.shape, x.shape[-1]), x.dtype)

    def at_block(path: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        watch.seen.given.append((path, args[0] if args else None))
        return call()

    def at_small(path: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        made = call()
        if len(args) == 1 and not kwargs:
            watch.seen.made.append((path, made))
        return made

    for path, module in model.named_modules():
        if path in experts:
            _wrap(module, partial(at_experts, path))
        elif path in blocks:
            _wrap(module, partial(at_block, path))
        elif not module.children() and any(a.ndim == 1 for _, a in _parameters(module)):
            _wrap(module, partial(at_small, path))
    return watch


def _norm_before(block: str, seen: _Seen) -> tuple[str, int] | None:
    """The module whose output, the very array, the block is given, and that array's width."""
    given = [x for path, x in seen.given if path == block]
    if len(given) != 1:
        return None
    for path, made in seen.made:
        if made is given[0]:
            return path, int(made.shape[-1])
    return None


def _choice_of(
    block: nn.Module, path: str, width: int, n_experts: int, watch: _Watch
) -> RouterChoice | None:
    """How the block chooses, by trying; None if nothing known comes close."""
    inside = dict(block.named_modules())
    random = np.random.default_rng(0)

    def draw(scale: float, shape: tuple[int, ...]) -> mx.array:
        return mx.array(random.standard_normal(shape).astype(np.float32) * scale)

    routers = []
    for name, array in _weights(block, n_experts):
        owner = name.rpartition(".")[0]
        if array.shape[1] == width and owner in inside:
            inside[owner]["weight"] = draw(width**-0.5, tuple(array.shape))
            routers.append(owner)
    biases: list[str | None] = [None]
    for name, array in _parameters(block):
        owner, _, last = name.rpartition(".")
        if array.shape == (n_experts,) and owner in inside and not _is_linear(inside[owner]):
            inside[owner][last] = mx.abs(draw(0.3, (n_experts,)))
            biases.append(name)
    x = draw(1.0, (1, _ROWS, width))
    try:
        block(x)
    except (*REFUSALS, RuntimeError):
        return None
    finally:
        reached = watch.take().reached
    if [entry[0] for entry in reached] != [path]:
        return None
    _, given, indices = reached[0]
    scaled = _is_scaled(given, x)
    if scaled is None:
        return None
    chosen = np.array(indices).reshape(_ROWS, -1)
    logits = {router: logits_of(inside[router], x)[0] for router in routers}
    mx.eval(logits)
    best, choice = _CLOSE, None
    for router, bias, scoring in _candidates(routers, biases, n_experts):
        values = None if bias is None else _lookup(inside, bias)
        scores = scoring(logits[router], values)
        share = _shared(np.array(top(scores, chosen.shape[-1])), chosen)
        if share > best:
            best, choice = share, RouterChoice(router, bias, scoring, scaled)
        if share >= _EXACT:
            break
    return choice


def _candidates(
    routers: list[str], biases: list[str | None], n_experts: int
) -> Iterator[tuple[str, str | None, Scoring]]:
    """Plain ones first: groups are many, and few models have them."""
    pairs = list(product(routers, biases))
    for router, bias in pairs:
        for scoring in plain_scorings(bias is not None):
            yield router, bias, scoring
    for router, bias in pairs:
        for scoring in grouped_scorings(n_experts, bias is not None):
            yield router, bias, scoring


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.QuantizedLinear))


def _lookup(modules: dict[str, nn.Module], name: str) -> mx.array:
    owner, _, last = name.rpartition(".")
    array: mx.array = modules[owner][last]
    return array


def _is_scaled(given: mx.array, x: mx.array) -> bool | None:
    """False if the experts are given the block's input, True if they are given it times some
    positive number per row, None if they are given something else."""
    if given.size != x.size:
        return None
    theirs = np.array(given.astype(mx.float32)).reshape(-1, x.shape[-1])
    ours = np.array(x).reshape(-1, x.shape[-1])
    scale = (theirs * ours).sum(axis=-1, keepdims=True) / (ours * ours).sum(axis=-1, keepdims=True)
    if not (scale > 0).all() or not np.allclose(theirs, scale * ours, rtol=1e-2, atol=1e-2):
        return None
    return not np.allclose(scale, 1, rtol=1e-3)


def _shared(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> float:
    return float(np.mean([np.isin(t, o).mean() for o, t in zip(ours, theirs, strict=True)]))
