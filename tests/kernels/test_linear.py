"""Native linear layers give what mlx's own do, and leave alone what they do not cover."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.mla import MultiLinear

from flashmoe import native
from flashmoe.kernels.linear import (
    LEAST_TURNED_ROWS,
    LEAST_WEIGHTS,
    left_lazy,
    native_twin,
    output_layers,
)

ROWS, COLS = 512, 256
TOLERANCE = 2e-6


def linear(bias: bool, rows: int = ROWS) -> nn.Linear:
    mx.random.seed(3)
    layer = nn.Linear(COLS, rows, bias=bias)
    mx.eval(layer.parameters())
    return layer


def twin_of(layer: nn.Module) -> nn.Module | None:
    """The native twin; None where there is no library, which needs a reason."""
    if native.available() is None:
        return native_twin(layer)
    assert "was not built" in str(native.available())
    return None


def assert_close(ours: mx.array, theirs: mx.array) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    error = np.linalg.norm(np.array(ours - theirs), axis=-1)
    assert (error <= TOLERANCE * np.linalg.norm(np.array(theirs), axis=-1)).all()


@pytest.mark.parametrize("shape", [(1, 1, COLS), (2, 5, COLS), (70, COLS)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "packing",
    [None, *({"bits": b, "group_size": 64} for b in (2, 3, 4, 5, 6, 8)), {"mode": "mxfp4"}],
    ids=str,
)
def test_products(packing: dict[str, int | str] | None, bias: bool, shape: tuple[int, ...]) -> None:
    layer: nn.Module = linear(bias)
    if packing is not None:
        group_size = 32 if "mode" in packing else 64
        layer = layer.to_quantized(**{"group_size": group_size, "bits": 4, **packing})
        mx.eval(layer.parameters())
    twin = twin_of(layer)
    if twin is None:
        return
    x = mx.random.normal(shape, key=mx.random.key(1))
    assert isinstance(twin, type(layer))
    assert_close(twin(x), layer(x))
    assert set(twin) == set(layer)


def test_embeddings_as_the_output_layer() -> None:
    layer = nn.Embedding(ROWS, COLS).to_quantized(group_size=64, bits=8)
    mx.eval(layer.parameters())
    twin = twin_of(layer)
    if twin is None:
        return
    x = mx.random.normal((1, 3, COLS), key=mx.random.key(2))
    assert_close(twin.as_linear(x), layer.as_linear(x))
    ids = mx.array([[0, 7, ROWS - 1]])
    assert mx.array_equal(twin(ids), layer(ids))


def test_unquantized_embeddings_as_the_output_layer() -> None:
    layer = nn.Embedding(ROWS, COLS)
    mx.eval(layer.parameters())
    twin = twin_of(layer)
    if twin is None:
        return
    x = mx.random.normal((1, 3, COLS), key=mx.random.key(2))
    assert_close(twin.as_linear(x), layer.as_linear(x))
    assert mx.array_equal(twin(mx.array([5, 0])), layer(mx.array([5, 0])))


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("shape", [(1, 8, 1, COLS), (2, 8, 5, COLS), (2, 1, 3, COLS)], ids=str)
def test_a_matrix_per_head(bits: int | None, shape: tuple[int, ...]) -> None:
    mx.random.seed(3)
    layer: nn.Module = MultiLinear(COLS, ROWS // 8, 8)
    if bits is not None:
        layer = layer.to_quantized(group_size=64, bits=bits)
    mx.eval(layer.parameters())
    twin = twin_of(layer)
    if twin is None:
        return
    assert isinstance(twin, type(layer))
    x = mx.random.normal(shape, key=mx.random.key(1))
    assert_close(twin(x), layer(x))
    back = mx.random.normal((*shape[:-1], ROWS // 8), key=mx.random.key(2))
    assert mx.array_equal(twin(back, transpose=False), layer(back, transpose=False))
    many = mx.random.normal((*shape[:-2], LEAST_TURNED_ROWS, ROWS // 8), key=mx.random.key(2))
    assert_close(twin(many, transpose=False), layer(many, transpose=False))


def test_other_dtypes_go_to_mlx() -> None:
    layer = linear(True).to_quantized(group_size=64, bits=4)
    mx.eval(layer.parameters())
    twin = twin_of(layer)
    if twin is None:
        return
    x = mx.random.normal((1, COLS), key=mx.random.key(4)).astype(mx.bfloat16)
    assert mx.array_equal(twin(x), layer(x))


def test_small_layers_and_other_modules_stay() -> None:
    assert twin_of(linear(False, rows=LEAST_WEIGHTS // COLS - 1)) is None
    assert twin_of(nn.RMSNorm(COLS)) is None
    assert twin_of(linear(False).to_quantized(group_size=16, bits=4, mode="nvfp4")) is None


def test_layers_left_to_mlx_for_a_while() -> None:
    small = linear(False).to_quantized(group_size=64, bits=4)
    large = linear(False, rows=2 * ROWS).to_quantized(group_size=64, bits=4)
    mx.eval(small.parameters(), large.parameters())
    twins = [twin_of(small), twin_of(large)]
    if None in twins:
        return
    model = nn.Sequential(*twins)
    x = mx.random.normal((3, COLS), key=mx.random.key(5))
    native = twins[1](x)
    assert output_layers(model) == [twins[1]]
    with left_lazy(output_layers(model)):
        assert mx.array_equal(twins[1](x), large(x))
    assert mx.array_equal(twins[1](x), native)
    assert output_layers(large) == []
