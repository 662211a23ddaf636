// hidden[pair] = activation(Wg x, Wu x) for every (token, chosen expert), or activation(Wu x).

#include <metal_stdlib>

#include "activation.h"
#include "packing.h"
#include "rows.h"

using namespace metal;

namespace flashmoe {

// x [n_tokens, cols], slots [n_tokens * top_k], hidden [n_tokens * top_k, rows] float32.
// Grid: x counts sets of rows, y counts pairs. Both matrices are packed alike; without Gated,
// `gate` is not read.
template <bool Gated, int Lanes, typename T, class M>
METAL_FUNC void expert_gate_up(
    const device T* x,
    const device int32_t* slots,
    M gate,
    M up,
    const constant int32_t* sizes,
    const constant float* limits,
    device float* hidden,
    threadgroup float* tiles,
    uint3 threadgroup_position,
    uint simdgroup,
    uint lane) {
  const uint n_rows = sizes[N_ROWS], n_cols = sizes[N_COLS], top_k = sizes[TOP_K];
  const uint pair = threadgroup_position.y;
  const M gates = gate.in_slot(slots[pair], n_rows, n_cols);
  const M ups = up.in_slot(slots[pair], n_rows, n_cols);
  const uint row = first_row<Lanes>(threadgroup_position.x, simdgroup, lane);
  const device T* token = x + uint64_t(pair / top_k) * n_cols;

  float gate_sums[ROWS] = {0.0f};
  float up_sums[ROWS] = {0.0f};
  uint turn = 0;
  for (uint start = 0; start < n_cols; start += CHUNK) {
    const uint width = min(uint(CHUNK), n_cols - start);
    threadgroup float* tile = tiles + turn * TILE_FLOATS;
    stage<M>(token + start, 1.0f, width, tile, simdgroup, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint unit = lane % Lanes; unit * M::VALUES < width; unit += Lanes) {
      float part[M::VALUES];
      load_unit<M>(tile, unit, part);
      const float part_sum = M::sum(part);
      const uint at = start / M::VALUES + unit;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const uint read = within(row + r, n_rows);
        if (Gated) gate_sums[r] += gates.product(read, n_cols, at, part, part_sum);
        up_sums[r] += ups.product(read, n_cols, at, part, part_sum);
      }
    }
    turn ^= 1;
  }

#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const uint read = within(row + r, n_rows);
    const float u = sum_over_lanes<Lanes>(up_sums[r]) + ups.bias_of(read);
    float value;
    if (Gated) {
      const float g = sum_over_lanes<Lanes>(gate_sums[r]) + gates.bias_of(read);
      value = activated(sizes[ACTIVATION], limits, g, u);
    } else {
      value = activated(sizes[ACTIVATION], limits, u);
    }
    if (lane % Lanes == 0 && row + r < n_rows) hidden[uint64_t(pair) * n_rows + row + r] = value;
  }
}

}  // namespace flashmoe
