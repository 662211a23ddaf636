// y[token] = sum over the chosen experts of score * (Wd hidden), or every term on its own.

#include <metal_stdlib>

#include "packing.h"
#include "rows.h"

using namespace metal;

namespace flashmoe {

// hidden [n_tokens * top_k, cols] float32, slots [n_tokens * top_k].
// With Scored: scores [n_tokens * top_k] float32, y [n_tokens, rows], grid y counts tokens.
// Without: scores are not read, y [n_tokens * top_k, rows], grid y counts pairs.
template <bool Scored, int Lanes, typename T, class M>
METAL_FUNC void expert_down(
    const device float* hidden,
    const device int32_t* slots,
    const device float* scores,
    M down,
    const constant int32_t* sizes,
    device T* y,
    threadgroup float* tiles,
    uint3 threadgroup_position,
    uint simdgroup,
    uint lane) {
  const uint n_rows = sizes[N_ROWS], n_cols = sizes[N_COLS];
  const uint n_terms = Scored ? sizes[TOP_K] : 1;
  const uint output = threadgroup_position.y;
  const uint first_pair = output * n_terms;
  const uint row = first_row<Lanes>(threadgroup_position.x, simdgroup, lane);

  float sums[ROWS] = {0.0f};
  uint turn = 0;
  for (uint pair = first_pair; pair < first_pair + n_terms; ++pair) {
    const M expert = down.in_slot(slots[pair], n_rows, n_cols);
    const device float* input = hidden + uint64_t(pair) * n_cols;
    const float score = Scored ? scores[pair] : 1.0f;
    for (uint start = 0; start < n_cols; start += CHUNK) {
      const uint width = min(uint(CHUNK), n_cols - start);
      threadgroup float* tile = tiles + turn * TILE_FLOATS;
      stage<M>(input + start, score, width, tile, simdgroup, lane);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint unit = lane % Lanes; unit * M::VALUES < width; unit += Lanes) {
        float part[M::VALUES];
        load_unit<M>(tile, unit, part);
        const float part_sum = M::sum(part);
        const uint at = start / M::VALUES + unit;
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
          sums[r] += expert.product(within(row + r, n_rows), n_cols, at, part, part_sum);
      }
      turn ^= 1;
    }
    if (lane % Lanes == 0) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) sums[r] += score * expert.bias_of(within(row + r, n_rows));
    }
  }

#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float value = sum_over_lanes<Lanes>(sums[r]);
    if (lane % Lanes == 0 && row + r < n_rows)
      y[uint64_t(output) * n_rows + row + r] = static_cast<T>(value);
  }
}

}  // namespace flashmoe
