"""Native attention against float64, against itself in other company, and against MLX."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe import native
from flashmoe.base.errors import OptionError
from flashmoe.native import loader
from tests.support.natives import compiled, isas_here

Array = npt.NDArray[Any]
# Of the largest value: outputs are weighted means of values.
TOLERANCE = 2e-6


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Every test leaves the library as it was."""
    if native.available() is not None:
        yield
        return
    isa = native.isa()
    yield
    native.use_isa(isa)
    native.set_threads(0)


def in_float64(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    causal: bool = False,
    mask: Array | None = None,
    sinks: Array | None = None,
) -> Array:
    """[batch, queries, heads, v_dim]; a hidden key has the lowest score instead of none."""
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    k, v = (np.repeat(array, q.shape[1] // k.shape[1], axis=1) for array in (k, v))
    scores = scale * q @ k.swapaxes(-1, -2)
    n_queries, n_keys = scores.shape[-2:]
    if causal:
        mask = np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool)
    if mask is not None:
        scores = np.where(mask, scores, -1e30) if mask.dtype == bool else scores + mask
    if sinks is not None:
        sink = np.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        scores = np.concatenate([scores, sink], axis=-1)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return (shares[..., :n_keys] @ v).transpose(0, 2, 1, 3)


def draw(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


@compiled
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    queries=st.one_of(st.integers(1, 5), st.integers(60, 90)),
    more_keys=st.one_of(st.integers(0, 9), st.integers(500, 600)),
    k_dim=st.integers(1, 70),
    v_dim=st.integers(1, 70),
    masked=st.sampled_from(["no", "causal", "boolean", "added"]),
    with_sinks=st.booleans(),
    strided=st.booleans(),
    isa=st.sampled_from(["avx512", "avx2", "neon", "portable"]),
    seed=st.integers(0, 99),
)
def test_against_float64(
    batch: int,
    kv_heads: int,
    group: int,
    queries: int,
    more_keys: int,
    k_dim: int,
    v_dim: int,
    masked: str,
    with_sinks: bool,
    strided: bool,
    isa: str,
    seed: int,
) -> None:
    if isa not in isas_here():
        isa = "portable"
    native.use_isa(isa)
    rng = np.random.default_rng(seed)
    heads, keys = kv_heads * group, queries + more_keys
    if strided:
        # As projections and caches leave them; values out of the middle of wider rows.
        q = draw(rng, batch, queries, heads, k_dim).transpose(0, 2, 1, 3)
        k = draw(rng, batch, kv_heads, keys + 7, k_dim)[:, :, :keys]
        v = draw(rng, batch, kv_heads, v_dim + 3, keys).transpose(0, 1, 3, 2)[..., 1 : v_dim + 1]
    else:
        q = draw(rng, batch, heads, queries, k_dim)
        k, v = (draw(rng, batch, kv_heads, keys, dim) for dim in (k_dim, v_dim))
    options: dict[str, Any] = {"scale": 2 / k_dim**0.5, "causal": masked == "causal"}
    if masked == "boolean":
        options["mask"] = rng.random((batch, 1, queries, keys)) < 0.5
    if masked == "added":
        options["mask"] = draw(rng, 1, heads, queries, keys)
    if with_sinks:
        options["sinks"] = draw(rng, heads)
    y = native.attend(q, k, v, **options)
    assert y.shape == (batch, queries, heads, v_dim)
    assert np.abs(y - in_float64(q, k, v, **options)).max() <= TOLERANCE * np.abs(v).max()


@compiled
@pytest.mark.parametrize("masked", ["no", "causal", "window", "added"])
def test_a_row_has_the_same_bits_in_any_company(masked: str) -> None:
    rng = np.random.default_rng(5)
    n, keys = 150, 1300
    q, k, v = draw(rng, 2, 6, n, 24), draw(rng, 2, 2, keys, 24), draw(rng, 2, 2, keys, 20)
    at, position = np.arange(keys)[None], np.arange(keys - n, keys)[:, None]
    mask = None
    if masked == "window":
        mask = (at <= position) & (at > position - 100)
    if masked == "added":
        mask = draw(rng, n, keys)
    for isa in isas_here():
        native.use_isa(isa)
        native.set_threads(1)
        causal = masked == "causal"
        together = native.attend(q, k, v, scale=0.3, causal=causal, mask=mask)
        for threads in (2, 3, 16):
            native.set_threads(threads)
            again = native.attend(q, k, v, scale=0.3, causal=causal, mask=mask)
            assert np.array_equal(again, together)
            last = None if mask is None else mask[-1:]
            alone = native.attend(q[:, :, -1:], k, v, scale=0.3, causal=causal, mask=last)
            assert np.array_equal(alone, together[:, -1:])
            # One head of keys with its own queries, in the second entry of the batch.
            some = native.attend(
                q[1:, 3:], k[1:, 1:], v[1:, 1:], scale=0.3, causal=causal, mask=mask
            )
            assert np.array_equal(some, together[1:, :, 3:])


@compiled
def test_rows_that_see_nothing_are_what_they_are_for_mlx() -> None:
    rng = np.random.default_rng(2)
    q, k, v = draw(rng, 1, 2, 3, 8), draw(rng, 1, 1, 90, 8), draw(rng, 1, 1, 90, 5)
    boolean = np.ones((3, 90), bool)
    boolean[1] = False
    lowest = np.where(boolean, np.float32(0), np.finfo(np.float32).min)
    some = lowest.copy()
    some[1, 40:] = -np.inf
    for mask in (boolean, lowest, some):
        y = native.attend(q, k, v, scale=1.0, mask=mask)
        theirs = mx.fast.scaled_dot_product_attention(
            *(mx.array(array) for array in (q, k, v)), scale=1.0, mask=mx.array(mask)
        )
        assert np.abs(y - np.array(theirs).transpose(0, 2, 1, 3)).max() < 1e-6
    none = np.where(boolean, np.float32(0), -np.float32(np.inf))
    y = native.attend(q, k, v, scale=1.0, mask=none)
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(y[:, [0, 2]]).all()
    with_sinks = native.attend(q, k, v, scale=1.0, mask=none, sinks=np.zeros(2, np.float32))
    assert (with_sinks[:, 1] == 0).all()


@compiled
def test_what_is_no_number_stays_none() -> None:
    rng = np.random.default_rng(3)
    q, k, v = draw(rng, 1, 1, 4, 8), draw(rng, 1, 1, 70, 8), draw(rng, 1, 1, 70, 8)
    q[0, 0, 1, 3] = np.nan
    y = native.attend(q, k, v, scale=1.0)
    assert np.isnan(y[0, 1]).all()
    assert np.isfinite(y[0, [0, 2, 3]]).all()
    huge = np.full((1, 1, 4, 8), 1e18, np.float32)
    assert np.isfinite(native.attend(huge, huge, huge, scale=1.0)).all()


@compiled
def test_arguments_that_do_not_fit() -> None:
    q, k = np.zeros((1, 4, 3, 8), np.float32), np.zeros((1, 2, 5, 8), np.float32)
    with pytest.raises(OptionError, match=r"k \[1, 2, 5, 8\] and v \[1, 2, 4, 8\] do not fit q"):
        native.attend(q, k, k[:, :, :4], scale=1.0)
    with pytest.raises(OptionError, match="float32 only"):
        native.attend(q.astype(np.float64), k, k, scale=1.0)
    with pytest.raises(OptionError, match="a mask of int32 is not covered"):
        native.attend(q, k, k, scale=1.0, mask=np.zeros((3, 5), np.int32))
    with pytest.raises(OptionError, match=r"sinks must be \[4\], not \[3\]"):
        native.attend(q, k, k, scale=1.0, sinks=np.zeros(3, np.float32))
    with pytest.raises(OptionError, match="do not fit together"):
        native.attend(q[:, :3], k, k, scale=1.0)
    with pytest.raises(OptionError, match="do not fit together"):
        native.attend(q, k[:, :, :2], k[:, :, :2], scale=1.0, causal=True)
    assert native.attend(q[:, :, :0], k, k, scale=1.0).shape == (1, 0, 4, 8)
    attend = loader.loaded().fm_attend
    assert attend(loader.FmAttention(), None) == loader.BAD_ARGUMENT
