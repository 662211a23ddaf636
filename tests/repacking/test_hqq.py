"""Fitted quantization: packed as MLX packs, never further off than rounding to nearest."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe import OptionError, native, repack
from flashmoe.kernels.packing import pack_codes
from flashmoe.repacking import hqq
from flashmoe.store.layout import Quantization
from tests.support.checkpoints import PROJECTIONS, as_tensor, mlx_arrays, save_float, store_tensors
from tests.support.families import FAMILIES
from tests.support.natives import compiled, isas_here
from tests.support.refusals import refused

BITS = (2, 3, 4, 5, 6, 8)
DTYPES = (mx.float32, mx.bfloat16, mx.float16)


def dequantized(parts, group_size, bits):
    """Packed weights as float64; scales are widened first, so that nothing is rounded again."""
    weight, scales, biases = parts
    floats = mx.dequantize(
        weight, scales.astype(mx.float32), biases.astype(mx.float32), group_size, bits
    )
    return np.array(floats, np.float64)


def errors(weight, parts, group_size, bits, power=hqq.P):
    """The sum of |error|^power of each group."""
    exact = np.array(weight.astype(mx.float32), np.float64)
    off = np.abs(dequantized(parts, group_size, bits) - exact) ** power
    return off.reshape(-1, group_size).sum(axis=1)


def random_weight(shape, dtype, kind, seed=0):
    draw = np.random.default_rng(seed)
    floats = {
        "normal": draw.standard_normal(shape),
        "heavy": draw.standard_t(2, shape),
        "skewed": draw.exponential(size=shape) + 3,
        "far": draw.standard_normal(shape) + 1000,
    }[kind]
    return mx.array(0.02 * floats, mx.float32).astype(dtype)


@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 5),
    runs=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_come_out_as_they_went_in(bits, rows, runs, seed):
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 2**bits, (rows, 32 * runs), dtype=np.uint32)
    packed = pack_codes(mx.array(codes), bits)
    assert (packed.dtype, packed.shape) == (mx.uint32, (rows, runs * bits))
    ones = mx.ones((rows, runs))
    unpacked = mx.dequantize(packed, ones, mx.zeros_like(ones), group_size=32, bits=bits)
    assert np.array_equal(np.array(unpacked), codes)


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_packed_as_mlx_packs(bits):
    weight = random_weight((3, 128), mx.float32, "normal")
    packed, scales, _ = mx.quantize(weight, group_size=32, bits=bits)
    ones = mx.ones_like(scales)
    codes = mx.dequantize(packed, ones, mx.zeros_like(ones), group_size=32, bits=bits)
    assert mx.array_equal(pack_codes(codes, bits), packed)


def fitted_by_mlx(weight, group_size, bits):
    """As on a GPU, or without the native library."""
    codes, scales, biases = hqq.fit(weight.reshape(-1, group_size), bits)
    shape = (weight.shape[0], weight.shape[1] // group_size)
    packed = pack_codes(codes, bits).reshape(weight.shape[0], -1)
    return packed, scales.reshape(shape), biases.reshape(shape)


@pytest.mark.parametrize("quantize", [hqq.quantize, fitted_by_mlx], ids=["default", "mlx"])
@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from((32, 64, 128)),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(("normal", "heavy", "skewed", "far")),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_group_is_further_off_than_rounding(quantize, bits, group_size, dtype, kind, seed):
    weight = random_weight((6, 128), dtype, kind, seed)
    fitted = errors(weight, quantize(weight, group_size, bits), group_size, bits)
    packed = mx.quantize(weight, group_size=group_size, bits=bits)
    rounded = errors(weight, packed, group_size, bits)
    assert np.all(fitted <= rounded * (1 + 1e-4) + 1e-30)


@pytest.mark.parametrize(
    ("kind", "bits", "most"),
    [
        ("normal", 2, 0.74),
        ("normal", 3, 0.80),
        ("normal", 4, 0.84),
        ("normal", 5, 0.90),
        ("normal", 6, 0.95),
        ("normal", 8, 0.99),
        ("heavy", 2, 0.9),
        ("heavy", 3, 0.9),
        ("heavy", 4, 0.95),
    ],
)
def test_errors_are_well_below_rounding(kind, bits, most):
    weight = random_weight((64, 256), mx.float32, kind)
    fitted = errors(weight, hqq.quantize(weight, 64, bits), 64, bits, power=2).sum()
    packed = mx.quantize(weight, group_size=64, bits=bits)
    assert fitted < most * errors(weight, packed, 64, bits, power=2).sum()


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_the_native_fit_is_mlx_s(bits, dtype):
    weight = random_weight((64, 256), dtype, "heavy")
    before = native.isa()
    try:
        for isa, group_size in itertools.product(isas_here(), (32, 64, 128)):
            native.use_isa(isa)
            fitted = errors(weight, hqq.quantize(weight, group_size, bits), group_size, bits)
            twin = errors(weight, fitted_by_mlx(weight, group_size, bits), group_size, bits)
            assert fitted.sum() == pytest.approx(twin.sum(), rel=2e-3)
            # Rounding may send a group to another local minimum; few of them.
            assert np.isclose(fitted, twin, rtol=1e-3).mean() > 0.9
    finally:
        native.use_isa(before)


@compiled
def test_what_the_native_fit_does_not_cover():
    groups, scales = mx.zeros((4, 64)), mx.zeros(4)
    options = {"bits": 4, "starts": (1.0,), "rounds": 1, "least_residual": 0.01}
    for bits in (1, 7, 16):
        with refused(OptionError, "does not cover"):
            native.fit_groups(groups, scales, scales, **{**options, "bits": bits})
    with refused(OptionError, "does not cover"):
        native.fit_groups(mx.zeros((4, 96)), scales, scales, **options)
    with refused(OptionError, "4 groups"):
        native.fit_groups(groups, mx.zeros(3), mx.zeros(3), **options)
    with refused(OptionError, "cannot be fitted"):
        native.fit_groups(groups.astype(mx.bfloat16), scales, scales, **options)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_do_not_shrink(bits):
    weight = random_weight((64, 256), mx.float32, "normal")
    exact = np.array(weight, np.float64)
    fitted = dequantized(hqq.quantize(weight, 64, bits), 64, bits)
    assert (fitted**2).sum() / (exact**2).sum() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-6])
def test_groups_of_one_value(dtype, value):
    weight = mx.full((2, 64), value, dtype)
    parts = hqq.quantize(weight, 32, 2)
    assert np.array_equal(
        dequantized(parts, 32, 2), np.array(weight.astype(mx.float32), np.float64)
    )


def test_weights_on_the_grid_stay_there():
    codes = np.random.default_rng(0).integers(0, 4, (8, 64))
    codes[:, :4] = range(4)
    weight = mx.array(codes * 0.25 - 0.5, mx.bfloat16)
    assert errors(weight, hqq.quantize(weight, 64, 2), 64, 2).sum() == 0


@pytest.mark.parametrize("chunk", [32, 1000, 2**20])
def test_slices_do_not_change_a_row(monkeypatch, chunk):
    weight = random_weight((4, 8, 128), mx.bfloat16, "heavy")
    whole = hqq.quantize(weight, 32, 3)
    monkeypatch.setattr(hqq, "CPU_CHUNK", chunk)
    monkeypatch.setattr(hqq, "CHUNK", chunk)
    parts = [hqq.quantize(weight[i], 32, 3) for i in range(4)]
    for array, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert mx.array_equal(array, mx.stack(list(pieces)))


@pytest.fixture(scope="module")
def bfloat_qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bfloat_qwen")
    save_float(folder, FAMILIES["qwen3_moe"], dtype=mx.bfloat16)
    return folder


def test_a_store_holds_what_was_fitted(bfloat_qwen, dest):
    store = repack(bfloat_qwen, dest, bits=3, method="hqq", resident_bits=8)
    stored, source = store_tensors(store), mlx_arrays(bfloat_qwen)
    paths = [f"{layer.layout.path}.{p}" for layer in store.manifest.layers for p in PROJECTIONS]
    expected = {path: (source[f"{path}.weight"], 3) for path in paths}
    expected["lm_head"] = (source["lm_head.weight"], 8)
    for path, (weight, bits) in expected.items():
        parts = hqq.quantize(weight, 64, bits)
        for name, array in zip(("weight", "scales", "biases"), parts, strict=True):
            assert stored[f"{path}.{name}"] == as_tensor(array)


def test_a_recipe_reaches_the_store(bfloat_qwen, dest, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        "bits = 8\n[experts]\nbits = 3\nmethod = 'hqq'\n[experts.down]\nmode = 'mxfp4'\n"
        "[attention]\nbits = 4\ngroup = 32\n[head]\nbits = 32\n"
        "[[layers]]\nfirst = 2\n[layers.experts]\nmode = 'affine'\nbits = 6\nmethod = 'rtn'\n"
    )
    manifest = repack(bfloat_qwen, dest, recipe=recipe).manifest
    first, second = (layer.layout.projections for layer in manifest.layers)
    assert first == {
        "gate_proj": Quantization(3, 64),
        "up_proj": Quantization(3, 64),
        "down_proj": Quantization(4, 32, "mxfp4"),
    }
    assert set(second.values()) == {Quantization(6, 64)}
    assert manifest.quantization["model.layers.0.self_attn.q_proj"] == Quantization(4, 32)
    assert manifest.quantization["model.layers.0.mlp.up_proj"] == Quantization(8, 64)
    assert manifest.quantization["model.embed_tokens"] == Quantization(8, 64)
    assert "lm_head" not in manifest.quantization
