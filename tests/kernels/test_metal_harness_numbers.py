"""Numbers in the Metal harness round as MSL says."""

import mlx.core as mx
import numpy as np
import pytest

from tests.support.metal_on_cpu import CompileFault, compiled
from tests.support.metal_runs import run_kernel
from tests.support.skips import needs

NARROW = [mx.float16, mx.bfloat16]
NAMES = {mx.float16: "half", mx.bfloat16: "bfloat"}
# The stand-in that GCC compiles has one max for all; Clang checks against one per type.
AMBIGUOUS = needs("clang++")

EXPRESSIONS = {
    # half with float is float, half with an integer is half
    "h(2048) + 1.0f": 2049.0,
    "h(2048) + h(1)": 2048.0,
    "h(2048) + 1": 2048.0,
    "h(2050) + 1": 2052.0,
    "float(h(65504) + h(16))": float("inf"),
    "bfloat(256.0f) + bfloat(1.0f)": 256.0,
    "bfloat(256.0f) + 1.0f": 257.0,
    "0.1f * 3 == 0.1 * 3 ? 1 : 0": 1.0,
    "as_type<float>(0x3f800000u)": 1.0,
    "float(as_type<half>(ushort(0x3c00)))": 1.0,
    "float(as_type<half2>(0x40003c00u).y)": 2.0,
    "float2(float4(1, 2, 3, 4).zw).y": 4.0,
    "dot(float4(1, 2, 3, 4), float4(float2(5, 6), 7, 8))": 70.0,
    "float((uchar4(1, 2, 3, 250) + uchar4(10)).w)": 4.0,
    "float4(uchar4(1, 2, 3, 255))[3]": 255.0,
    "(uint4(0xff00ff00u) >> 8 & 0xffu).x": 255.0,
    "sizeof(float3) + sizeof(packed_float3) + alignof(uint4)": 44.0,
    "fma(0.1f, 10.0f, -1.0f)": float(np.float64(np.float32(0.1)) * 10 - 1),
    "clamp(7, 1, 5) + max(2u, 3u) + min(1.5f, 2.0f)": 9.5,
    "select(1.0f, 2.0f, true) + sign(-3.0f)": 1.0,
    "popcount(0xf0fu) + clz(1u) + ctz(8u)": 42.0,
    "metal::precise::exp(0.0f) + rsqrt(4.0f) + exp2(3.0f)": 9.5,
    "float(numeric_limits<half>::max())": 65504.0,
}


def run_each(body: str, inputs: dict[str, mx.array], dtype: mx.Dtype) -> mx.array:
    """What `body` leaves in y[i] for every element of x; n is how many there are."""
    n = inputs["x"].size
    body = f"uint i = thread_position_in_grid.x; {body}"
    return run_kernel(body, inputs, {"y": ((n,), dtype)}, threads=(n,), group=(256,))[0]


def bits(array: mx.array) -> np.ndarray:
    return np.asarray(array.view({2: mx.uint16, 4: mx.uint32}[array.dtype.size]))


def every_pattern(dtype: mx.Dtype) -> mx.array:
    return mx.arange(65536).astype(mx.uint16).view(dtype)


def hard_floats(dtype: mx.Dtype) -> mx.array:
    """Floats around every number of the dtype and every point halfway between two of them."""
    ends = np.asarray(every_pattern(dtype).astype(mx.float32))
    ends = np.sort(ends[np.isfinite(ends)]).astype(np.float64)
    middles = ((ends[1:] + ends[:-1]) / 2).astype(np.float32)
    largest = np.float32(3.4028235e38)
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.choice(middles, 20000), rng.choice(ends, 5000).astype(np.float32)])
    points = np.concatenate([points, middles[:40], middles[-40:]])
    around = [points, np.nextafter(points, -largest), np.nextafter(points, largest)]
    return mx.array(np.concatenate([*around, np.float32([np.inf, -np.inf, 65519.99, 65520])]))


@pytest.mark.parametrize("dtype", NARROW)
@compiled
def test_a_narrow_float_becomes_the_same_float(dtype: mx.Dtype) -> None:
    x = every_pattern(dtype)
    y = run_each("y[i] = float(x[i]);", {"x": x}, mx.float32)
    assert mx.array_equal(y, x.astype(mx.float32), equal_nan=True)


@pytest.mark.parametrize("dtype", NARROW)
@compiled
def test_a_float_is_rounded_to_nearest_even(dtype: mx.Dtype) -> None:
    x = hard_floats(dtype)
    y = run_each(f"y[i] = {NAMES[dtype]}(x[i]);", {"x": x}, dtype)
    if dtype == mx.float16:
        with np.errstate(over="ignore"):
            expected = np.asarray(x).astype(np.float16).view(np.uint16)
    else:
        wide = np.asarray(x).view(np.uint32).astype(np.uint64)
        expected = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
    assert np.array_equal(bits(y), expected)


@pytest.mark.parametrize("operation", "+-*/")
@compiled
def test_half_rounds_after_every_operation(operation: str) -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 65536, 20000).astype(np.uint16).view(np.float16) for _ in range(2))
    with np.errstate(all="ignore"):
        expected = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operation]
    got = run_each(
        f"y[i] = x[i] {operation} b[i];", {"x": mx.array(a), "b": mx.array(b)}, mx.float16
    )
    assert np.array_equal(np.asarray(got), expected, equal_nan=True)


@pytest.mark.parametrize("operation", "+-*/")
@compiled
def test_bfloat_rounds_after_every_operation(operation: str) -> None:
    rng = np.random.default_rng(2)
    a, b = (mx.array(rng.normal(size=20000)).astype(mx.bfloat16) for _ in range(2))
    got = run_each(f"y[i] = x[i] {operation} b[i];", {"x": a, "b": b}, mx.bfloat16)
    wide = {"a": a.astype(mx.float32), "b": b.astype(mx.float32)}
    expected = eval(f"a {operation} b", {}, wide).astype(mx.bfloat16)
    assert np.array_equal(bits(got), bits(expected))


@compiled
def test_expressions() -> None:
    body = "typedef half h; float zero = x[0];"
    body += "".join(f"\ny[{i}] = zero + ({text});" for i, text in enumerate(EXPRESSIONS))
    outputs = {"y": ((len(EXPRESSIONS),), mx.float32)}
    (y,) = run_kernel(body, {"x": mx.zeros(1)}, outputs, threads=(1,))
    assert dict(zip(EXPRESSIONS, y.tolist(), strict=True)) == EXPRESSIONS


@compiled
def test_part_of_a_vector_is_written_alone() -> None:
    body = "float4 v = float4(1, 2, 3, 4); float4 w = 9; v.xy = w.xy; v.zw = v.xy; y[i] = v[i];"
    assert run_each(body, {"x": mx.zeros(4)}, mx.float32).tolist() == [9, 9, 9, 9]
    body = "float4 v = float4(1, 2, 3, 4); float4 w = 9; v.xy = w.xy; y[i] = v[i];"
    assert run_each(body, {"x": mx.zeros(4)}, mx.float32).tolist() == [9, 9, 3, 4]


@pytest.mark.parametrize(
    "statement",
    [
        "bfloat b = 1.0f;",
        "bfloat b = x[i]; ",
        "half h = half(1); h = bfloat(1.0f) + bfloat(2.0f);",
        pytest.param("float f = max(1.0f, 2);", marks=AMBIGUOUS),
        "float4 f = uint4(1);",
        pytest.param("float f = max(1, 2u);", marks=AMBIGUOUS),
    ],
)
@compiled
def test_conversions_that_metal_lacks_do_not_compile(statement: str) -> None:
    with pytest.raises(CompileFault):
        run_each(f"{statement} y[i] = x[i];", {"x": mx.zeros(1)}, mx.float32)
