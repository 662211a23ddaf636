"""Expert tensors in layouts that mlx-lm's sanitize does not read, at the smallest size."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from flashmoe.checkpoint.weights import adapting

EXPERTS, WIDTH, HIDDEN = 3, 4, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = SwitchGLU(WIDTH, HIDDEN, EXPERTS)


class Model(nn.Module):
    """One block at `mlp`, and a sanitize that splits fused tensors `[experts, d_in, d_out]`."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Block()

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        fused = weights.pop("mlp.experts.gate_up_proj", None)
        if fused is not None:
            for name, part in zip(("gate_proj", "up_proj"), mx.split(fused, 2, -1), strict=True):
                weights[f"mlp.experts.{name}.weight"] = part.swapaxes(-1, -2)
            down = weights.pop("mlp.experts.down_proj")
            weights["mlp.experts.down_proj.weight"] = down.swapaxes(-1, -2)
        return weights


class Outer(nn.Module):
    """A layer with a norm beside its block, and no sanitize."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [{"mlp": Block(), "norm": nn.RMSNorm(WIDTH)}]


def tensors(seed: int = 0) -> dict[str, mx.array]:
    """The projections as the model holds them."""
    keys = mx.random.split(mx.random.key(seed), 3)
    up, down = (EXPERTS, HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN)
    shapes = {"gate_proj": up, "up_proj": up, "down_proj": down}
    return {
        name: mx.random.normal(shape, key=key)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def sanitized(model_class: type[nn.Module], weights: dict[str, mx.array]) -> dict[str, mx.array]:
    model: Any = adapting(model_class)()
    before = dict(weights)
    result: dict[str, mx.array] = model.sanitize(weights)
    assert weights == before
    return result


def assert_equal(result: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert set(result) == set(expected)
    for name, array in expected.items():
        assert mx.array_equal(result[name], array), name


def expected(prefix: str, own: dict[str, mx.array]) -> dict[str, mx.array]:
    return {f"{prefix}.{name}.weight": array for name, array in own.items()}


@pytest.mark.parametrize("axes", ["d_in, d_out", "d_out, d_in"])
def test_fused_either_way_round(axes: str) -> None:
    own = tensors()
    fused = mx.concatenate([own["gate_proj"], own["up_proj"]], axis=1)
    weights = {"mlp.experts.gate_up_proj": fused, "mlp.experts.down_proj": own["down_proj"]}
    if axes == "d_in, d_out":
        weights = {name: array.swapaxes(-1, -2) for name, array in weights.items()}
    assert_equal(sanitized(Model, weights), expected("mlp.experts", own))


def test_one_tensor_per_expert() -> None:
    own = tensors()
    weights = {
        f"layers.0.mlp.experts.{i}.{name}.weight": array[i]
        for name, array in own.items()
        for i in reversed(range(EXPERTS))
    }
    # An expert that computes nothing has some weights all the same.
    weights[f"layers.0.mlp.experts.{EXPERTS}.up_proj.weight"] = own["up_proj"][0]
    assert_equal(sanitized(Outer, weights), expected("layers.0.mlp.experts", own))


def test_layouts_that_do_not_fit_stay() -> None:
    weights = {f"mlp.experts.{name}": mx.zeros((EXPERTS, 5, 5)) for name in tensors()}
    assert set(sanitized(Model, weights)) == set(weights)


@pytest.mark.parametrize(
    ("name", "shape", "placed"),
    [
        ("layers.0.block.experts.up_proj.weight", (EXPERTS, HIDDEN, WIDTH), True),
        ("layers.0.block.experts.up_proj.weight", (EXPERTS, HIDDEN, 9), False),
        ("layers.1.mlp.experts.up_proj.weight", (EXPERTS, HIDDEN, WIDTH), False),
        ("layers.0.mlp.experts.down_proj.weight", (EXPERTS, HIDDEN, WIDTH), False),
        ("layers.0.block.more.experts.up_proj.weight", (EXPERTS, HIDDEN, WIDTH), False),
        ("layers.0.block.more.up_proj.weight", (EXPERTS, HIDDEN, WIDTH), False),
    ],
)
def test_strays(name: str, shape: tuple[int, ...], placed: bool) -> None:
    weights = expected("layers.0.mlp.experts", tensors()) | {"layers.0.norm.weight": mx.ones(WIDTH)}
    target = "layers.0.mlp.experts.up_proj.weight"
    del weights[target]
    if name in weights:
        name = name.replace("down", "other")
    weights[name] = mx.ones(shape)
    result = sanitized(Outer, weights)
    assert (target in result, name in result) == (placed, not placed)


def test_a_stray_that_fits_twice_stays() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = {"inner": {"norm": nn.RMSNorm(WIDTH)}}
            self.b = {"inner": {"norm": nn.RMSNorm(WIDTH)}}

    weights = {"c.inner.norm.weight": mx.ones(WIDTH)}
    assert set(sanitized(Twins, weights)) == set(weights)
