"""The Metal harness runs correct kernels and computes what Metal computes."""

import mlx.core as mx
import pytest
from metal_on_cpu import metal_kernel

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


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_correct_kernel_passes_all_detectors(dtype: mx.Dtype) -> None:
    kernel = metal_kernel("row_sum", ["x"], ["sums"], CALL, ROW_SUM)
    x = mx.random.normal((5, 512), key=mx.random.key(0)).astype(dtype)
    (sums,) = kernel(
        inputs=[x],
        template=[("T", dtype)],
        output_shapes=[(5,)],
        output_dtypes=[mx.float32],
        grid=(64, 5, 1),
        threadgroup=(64, 1, 1),
    )
    assert mx.abs(sums - x.astype(mx.float32).sum(axis=1)).max().item() < 1e-4
