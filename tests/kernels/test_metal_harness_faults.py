"""The Metal harness tells each fault: one faulty kernel per detector."""

import mlx.core as mx
import pytest

from tests.support.metal_on_cpu import KernelFault, compiled
from tests.support.metal_runs import run_kernel

X = {"x": mx.arange(64, dtype=mx.float32)}
Y = {"y": ((64,), mx.float32)}
TABLE = "constant float table[4] = {1, 2, 3, 4};"
HELPER = """
#include <metal_stdlib>
using namespace metal;
inline float total(float value) {
  float sum = value;
  for (uint i = 0; i < 2; ++i) sum += simd_sum(sum);
  return sum;
}
"""

# kind of fault -> body of the kernel (64 threads in one group), a piece of the fault's text
FAULTS = {
    "read past the end": (
        "out of bounds",
        "uint i = thread_position_in_grid.x; y[i] = x[i + 1];",
        "thread (63, 0, 0) in threadgroup (0, 0, 0) reads 4 bytes at offset 256 of x (256 bytes)",
    ),
    "read before the start": (
        "out of bounds",
        "uint i = thread_position_in_grid.x; y[i] = x[int(i) - 1];",
        "reads 4 bytes at offset -4 of x",
    ),
    "vector read across the end": (
        "out of bounds",
        "uint i = thread_position_in_grid.x;"
        "float4 v = *reinterpret_cast<const device packed_float4*>(x + (i == 0 ? 62 : 0));"
        "y[i] = v.x + v.y + v.z + v.w;",
        " of x (256 bytes)",
    ),
    "write past the end": (
        "out of bounds",
        "uint i = thread_position_in_grid.x; y[i + (i == 63)] = x[i];",
        "writes 4 bytes at offset 256 of y",
    ),
    "read far away": (
        "out of bounds",
        "uint i = thread_position_in_grid.x; y[i] = x[i * 1000000000ul];",
        "reads 4 bytes far from any buffer",
    ),
    "past a threadgroup variable": (
        "out of bounds",
        "threadgroup float a[8]; threadgroup float b[8]; threadgroup float* p = a;"
        "uint i = thread_position_in_grid.x; p[i] = 1; b[i % 8] = p[i]; y[i] = b[i % 8];",
        "writes 4 bytes at offset 32 of a (32 bytes)",
    ),
    "past a constant table": (
        "out of bounds",
        "uint i = thread_position_in_grid.x; y[i] = table[i % 5];",
        "index is outside the array",
    ),
    "a vector at an odd address": (
        "misaligned access",
        "uint i = thread_position_in_grid.x;"
        "y[i] = float4(*reinterpret_cast<const device float4*>(x + i % 60)).x;",
        "4 bytes past a multiple of 16",
    ),
    "a number at an odd address": (
        "misaligned access",
        "uint i = thread_position_in_grid.x;"
        "y[i] = *reinterpret_cast<const device uint*>(\n"
        "    reinterpret_cast<const device uchar*>(x) + (i == 9));",
        "thread (9, 0, 0) in threadgroup (0, 0, 0) the address is 1 bytes past a multiple of 4",
    ),
    "an input written": (
        "input written",
        "uint i = thread_position_in_grid.x; y[i] = 1; const_cast<device float*>(x)[i] = 2;",
        "writes 4 bytes at offset 0 of x",
    ),
    "an output not written": (
        "output not written",
        "uint i = thread_position_in_grid.x; if (i != 3 && i != 9) y[i] = x[i];",
        "8 of 256 bytes of y were not written, the first at offset 12",
    ),
    "an output read before it is written": (
        "unwritten output",
        "uint i = thread_position_in_grid.x; y[i] += x[i];",
        "reads byte 0 of y",
    ),
    "an output written by two threads": (
        "output race",
        "uint i = thread_position_in_grid.x; y[i] = x[i]; y[i / 2] = x[i];",
        "of y, which thread (",
    ),
    "threadgroup memory read unwritten": (
        "unwritten threadgroup memory",
        "threadgroup float a[64]; uint i = thread_position_in_grid.x; if (i != 5) a[i] = x[i];"
        "threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = a[63 - i];",
        "thread (58, 0, 0) in threadgroup (0, 0, 0) reads byte 20 of a",
    ),
    "a read without a barrier": (
        "threadgroup race",
        "threadgroup float a[64]; uint i = thread_position_in_grid.x; a[i] = x[i];y[i] = a[i / 2];",
        "thread (1, 0, 0) in threadgroup (0, 0, 0) reads byte 0 of a, "
        "which thread (0, 0, 0) of the grid wrote",
    ),
    "a write after a read without a barrier": (
        "threadgroup race",
        "threadgroup float a[64]; uint i = thread_position_in_grid.x; a[i] = x[i];"
        "threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = a[0]; if (i == 63) a[0] = 1;",
        "thread (63, 0, 0) in threadgroup (0, 0, 0) writes byte 0 of a, "
        "which thread (0, 0, 0) of the grid read",
    ),
    "two writes without a barrier": (
        "threadgroup race",
        "threadgroup float a[1]; uint i = thread_position_in_grid.x; a[0] = x[i]; y[i] = x[i];",
        "writes byte 0 of a",
    ),
    "a barrier that does not order threadgroup memory": (
        "threadgroup race",
        "threadgroup float a[64]; uint i = thread_position_in_grid.x; a[i] = x[i];"
        "threadgroup_barrier(mem_flags::mem_device); y[i] = a[i ^ 1];",
        "with no barrier between",
    ),
    "a SIMD-group barrier between SIMD groups": (
        "threadgroup race",
        "threadgroup float a[64]; uint i = thread_position_in_grid.x; a[i] = x[i];"
        "simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = a[i ^ 1] + a[(i + 32) % 64];",
        "with no barrier between",
    ),
    "too much threadgroup memory": (
        "threadgroup memory",
        "threadgroup float a[8193]; uint i = thread_position_in_grid.x; a[i] = x[i]; y[i] = a[i];",
        "32772 bytes are declared, and Metal gives 32768",
    ),
    "a barrier that half the threads reach": (
        "barrier divergence",
        "uint i = thread_position_in_grid.x; y[i] = x[i];"
        "if (i < 40) threadgroup_barrier(mem_flags::mem_threadgroup);",
        "thread (0, 0, 0) is at threadgroup_barrier (line 13), thread (40, 0, 0) has returned",
    ),
    "two different barriers": (
        "barrier divergence",
        "uint i = thread_position_in_grid.x; y[i] = x[i];\n"
        "if (i < 32) threadgroup_barrier(mem_flags::mem_none);\n"
        "else threadgroup_barrier(mem_flags::mem_none);",
        "not all threads",
    ),
    "a SIMD function that some lanes miss": (
        "SIMD divergence",
        "uint i = thread_position_in_grid.x; y[i] = x[i]; if (i < 40) y[i] = simd_sum(x[i]);",
        "thread (32, 0, 0) is at simd_sum (line 13), thread (40, 0, 0) has returned",
    ),
    "lanes at a barrier and at a SIMD function": (
        "SIMD divergence",
        "uint i = thread_position_in_grid.x; y[i] = x[i];"
        "if (i & 1) threadgroup_barrier(mem_flags::mem_none); else y[i] = simd_max(x[i]);",
        "is at simd_max",
    ),
    "two SIMD functions": (
        "SIMD divergence",
        "uint i = thread_position_in_grid.x;"
        "y[i] = i & 1 ? simd_shuffle_xor(x[i], 1) : simd_sum(x[i]);",
        "are at different operations",
    ),
    "one SIMD function by two calls of a helper": (
        "SIMD divergence",
        "uint i = thread_position_in_grid.x;\n"
        "if (i & 1) y[i] = total(x[i]);\nelse y[i] = total(2 * x[i]);",
        "reached by other calls",
    ),
    "a lane that no thread has": (
        "SIMD lane",
        "uint i = thread_position_in_grid.x; y[i] = simd_shuffle(x[i], i + 1);",
        "asks for lane 32 of a SIMD group of 32 threads",
    ),
    "a shift by the number's width": (
        "shift",
        "uint i = thread_position_in_grid.x; y[i] = 1u << i;",
        "shifts by as many bits",
    ),
    "a division by zero": (
        "division",
        "uint i = thread_position_in_grid.x; y[i] = 64u / i;",
        "divides an integer by zero",
    ),
    "endless recursion": (
        "crash",
        "uint i = thread_position_in_grid.x; y[i] = deeper(x[i]);",
        "ended the runner",
    ),
}
DEEPER = "inline float deeper(float a) { return simd_sum(a) + deeper(a + 1); }"


@pytest.mark.parametrize("fault", FAULTS)
@compiled
def test_a_fault_is_told(fault: str) -> None:
    kind, body, text = FAULTS[fault]
    with pytest.raises(KernelFault) as told:
        run_kernel(body, X, Y, header=HELPER + TABLE + DEEPER, threads=(64,), group=(64,))
    assert told.value.kind == kind, told.value
    assert text in str(told.value)
    assert str(told.value).startswith(f"test: {kind}: ") or kind == "crash"
