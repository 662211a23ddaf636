"""The Metal harness runs correct kernels: positions, barriers, SIMD functions, what MLX passes."""

import mlx.core as mx
import numpy as np
import pytest

from tests.support.metal_on_cpu import KernelFault, compiled, metal_kernel
from tests.support.metal_on_cpu.build import fills_variables
from tests.support.metal_runs import run_kernel
from tests.support.skips import needs

ROW_SUM = """
#include <metal_stdlib>
#include <metal_simdgroup>
using namespace metal;

template <typename T>
inline void row_sum(const device T* x, device float* sums, threadgroup float* parts, uint lane,
                    uint simd, uint row, uint columns) {
  float sum = 0;
  for (uint i = simd * 32 + lane; i < columns / 4; i += 64) {
    float4 v = float4(*reinterpret_cast<const device vec<T, 4>*>(x + row * columns + 4 * i));
    sum += v.x + v.y + v.z + v.w;
  }
  sum = simd_sum(sum);
  if (lane == 0) parts[simd] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simd == 0 && lane == 0) sums[row] = parts[0] + parts[1];
}
"""
CALL = """
  threadgroup float parts[2];
  row_sum<T>(x, sums, parts, thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
             threadgroup_position_in_grid.y, x_shape[1]);
"""


def sum_rows(x: mx.array, offset: int = 0) -> mx.array:
    return run_kernel(
        CALL,
        {"x": x},
        {"sums": ((x.shape[0],), mx.float32)},
        header=ROW_SUM,
        threads=(64, x.shape[0]),
        group=(64,),
        template=[("T", x.dtype)],
        offsets={"x": offset},
    )[0]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@compiled
def test_a_correct_kernel_passes_all_detectors(dtype: mx.Dtype) -> None:
    x = mx.random.normal((5, 512), key=mx.random.key(0)).astype(dtype)
    sums = sum_rows(x)
    assert mx.abs(sums - x.astype(mx.float32).sum(axis=1)).max().item() < 1e-4


@compiled
def test_a_slice_may_begin_anywhere() -> None:
    x = mx.ones((2, 128))
    assert sum_rows(x, offset=32).tolist() == [128, 128]
    with pytest.raises(KernelFault, match="8 bytes past a multiple of 16"):
        sum_rows(x, offset=8)


@compiled
def test_it_stands_in_for_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    kernel = mx.fast.metal_kernel(
        name="scaled",
        input_names=["x", "scale"],
        output_names=["y", "shape"],
        source="uint i = thread_position_in_grid.x; y[i] = T(x[i] * scale) + T(N);"
        "if (i < 2) shape[i] = UP ? x_shape[i] * x_ndim + int(x_strides[i]) : 0;",
    )
    y, shape = kernel(
        inputs=[mx.arange(6, dtype=mx.int32).reshape(2, 3), 0.5],
        output_shapes=[(2, 3), (2,)],
        output_dtypes=[mx.bfloat16, mx.int32],
        grid=(6, 1, 1),
        threadgroup=(256, 1, 1),
        template=[("T", mx.bfloat16), ("N", 3), ("UP", True)],
    )
    assert y.dtype == mx.bfloat16
    assert y.tolist() == [[3, 3.5, 4], [4.5, 5, 5.5]]
    assert shape.tolist() == [2 * 2 + 3, 3 * 2 + 1]


@compiled
def test_outputs_may_have_a_value_before() -> None:
    body = "uint i = thread_position_in_grid.x; if (i % 2) y[i] += x[i];"
    x = mx.arange(4, dtype=mx.float16)
    outputs = {"y": ((4,), mx.float16)}
    (y,) = run_kernel(body, {"x": x}, outputs, threads=(4,), init_value=8)
    assert y.tolist() == [8, 9, 8, 11]


@compiled
def test_threadgroups_at_the_edge_are_smaller() -> None:
    body = """
      uint3 p = thread_position_in_grid;
      uint i = p.y * threads_per_grid.x + p.x;
      y[8 * i] = threads_per_threadgroup.x * 100 + threads_per_threadgroup.y;
      y[8 * i + 1] = threadgroup_position_in_grid.x * 100 + threadgroup_position_in_grid.y;
      y[8 * i + 2] = thread_position_in_threadgroup.x * 100 + thread_position_in_threadgroup.y;
      y[8 * i + 3] = thread_index_in_threadgroup;
      y[8 * i + 4] = simdgroup_index_in_threadgroup * 100 + thread_index_in_simdgroup;
      y[8 * i + 5] = simdgroups_per_threadgroup;
      y[8 * i + 6] = dispatch_threads_per_threadgroup.x + threads_per_simdgroup;
      y[8 * i + 7] = threadgroups_per_grid.x * 100 + threadgroups_per_grid.y + x[0];
    """
    x = {"x": mx.zeros((8,), mx.uint32)}
    outputs = {"y": ((5, 50, 8), mx.uint32)}
    (y,) = run_kernel(body, x, outputs, threads=(50, 5), group=(40, 2))
    assert y[1, 38].tolist() == [4002, 0, 3801, 78, 214, 3, 72, 203]
    assert y[4, 49].tolist() == [1001, 102, 900, 9, 9, 1, 72, 203]


@compiled
def test_threads_meet_at_barriers() -> None:
    body = """
      threadgroup float line[96];
      uint i = thread_position_in_threadgroup.x;
      line[i] = x[i];
      for (int step = 0; step < 5; ++step) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float next = line[(i + 1) % 96];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        line[i] = next;
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      y[thread_position_in_grid.x] = line[i ^ 1] + threadgroup_position_in_grid.x;
    """
    x = np.arange(96, dtype=np.float32)
    outputs = {"y": ((2, 96), mx.float32)}
    (y,) = run_kernel(body, {"x": mx.array(x)}, outputs, threads=(192,), group=(96,))
    expected = np.roll(x, -5)[np.arange(96) ^ 1]
    assert np.array_equal(np.asarray(y), [expected, expected + 1])


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.int32])
@compiled
def test_simd_functions(dtype: mx.Dtype) -> None:
    functions = {
        "simd_sum(v)": lambda g: np.full_like(g, g.sum()),
        "simd_max(v)": lambda g: np.full_like(g, g.max()),
        "simd_min(v)": lambda g: np.full_like(g, g.min()),
        "simd_prefix_inclusive_sum(v)": np.cumsum,
        "simd_broadcast(v, 3)": lambda g: np.full_like(g, g[3]),
        "simd_broadcast_first(v)": lambda g: np.full_like(g, g[0]),
        "simd_shuffle(v, (l * 3) % 8)": lambda g: g[np.arange(len(g)) * 3 % 8],
        "simd_shuffle_xor(v, 5)": lambda g: g[np.arange(len(g)) ^ 5],
        "simd_shuffle_up(v, 2)": lambda g: np.concatenate([g[:2], g[:-2]]),
        "T(simd_any(v > 20)) + T(2 * simd_all(v < 24))": lambda g: np.full_like(
            g, any(g > 20) + 2 * all(g < 24)
        ),
    }
    body = "uint i = thread_position_in_grid.x; uint l = thread_index_in_simdgroup; T v = x[i];"
    body += "".join(f"\ny[{k} * 40 + i] = {text};" for k, text in enumerate(functions))
    x = (np.arange(40) * 7 % 25).astype({4: np.float32, 2: np.float16}[dtype.size])
    outputs = {"y": ((len(functions), 40), dtype)}
    (y,) = run_kernel(
        body,
        {"x": mx.array(x).astype(dtype)},
        outputs,
        threads=(40,),
        group=(40,),
        template=[("T", dtype)],
    )
    for got, (text, function) in zip(np.asarray(y), functions.items(), strict=True):
        assert np.array_equal(got, np.concatenate([function(x[:32]), function(x[32:])])), text


@compiled
def test_upper_lanes_keep_their_value_when_shuffled_down() -> None:
    body = "uint i = thread_position_in_grid.x; y[i] = simd_shuffle_down(x[i], 4);"
    (y,) = run_kernel(body, {"x": mx.arange(32)}, {"y": ((32,), mx.int32)})
    assert y.tolist() == [*range(4, 32), *range(28, 32)]


@needs("GCC 12 or Clang", fills_variables())
@compiled
def test_a_variable_holds_rubbish_until_it_is_written() -> None:
    body = "uint i = thread_position_in_grid.x; float v; if (i < 16) v = x[i]; y[i] = v;"
    (y,) = run_kernel(body, {"x": mx.zeros(32)}, {"y": ((32,), mx.float32)})
    assert y[:16].tolist() == [0] * 16
    assert not (mx.abs(y[16:]) < 1e30).any().item()


@compiled
def test_a_threadgroup_has_at_most_1024_threads() -> None:
    with pytest.raises(KernelFault, match="Metal allows 1 to 1024"):
        run_kernel(
            "y[0] = x[0];",
            {"x": mx.zeros(1)},
            {"y": ((1,), mx.float32)},
            threads=(2048,),
            group=(1025,),
        )
