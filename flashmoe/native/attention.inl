// What attention is made of, included by kernels.inl behind the activations: outer products, and a
// softmax that goes on from block to block.

#include <math.h>
#include <stdint.h>

#include "kernels.h"

namespace flashmoe {
namespace {

// `Rows` rows from `row` on and `Vectors` vectors of columns from `column` on. Every output is one
// chain of multiply-adds in order, whatever the tile.
template <int Rows, int Vectors>
void outer_tile(const Outer& o, int64_t row, int64_t column) {
  Simd::Vector sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sums[r][v] = Simd::zero();
  const float* a = o.a + row * o.a_row;
  const float* b = o.b + column;
  const int64_t a_row = o.a_row, a_step = o.a_step, b_row = o.b_row, depth = o.depth;
  for (int64_t k = 0; k < depth; ++k) {
    Simd::Vector line[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) line[v] = Simd::load(b + v * Simd::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Simd::Vector factor = Simd::fill(a[r * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[r][v] = Simd::fma(factor, line[v], sums[r][v]);
    }
    a += a_step;
    b += b_row;
  }
  for (int r = 0; r < Rows; ++r) {
    if (o.kept && !o.kept[row + r]) continue;
    float* out = o.out + (row + r) * o.out_row + column;
    for (int v = 0; v < Vectors; ++v, out += Simd::kLanes) {
      Simd::Vector sum = sums[r][v];
      if (o.fade) sum = Simd::fma(Simd::load(out), Simd::fill(o.fade[row + r]), sum);
      Simd::store(out, sum);
    }
  }
}

template <int Rows, int Vectors>
void outer_rows(const Outer& o, int64_t row) {
  constexpr int64_t width = Vectors * Simd::kLanes;
  int64_t column = 0;
  for (; column + width <= o.columns; column += width) outer_tile<Rows, Vectors>(o, row, column);
  for (; column < o.columns; column += Simd::kLanes) outer_tile<Rows, 1>(o, row, column);
}

void outer(const Outer& o) {
  constexpr Shape shape = Simd::kOuter;
  int64_t row = 0;
  for (; row + shape.rows <= o.rows; row += shape.rows)
    outer_rows<shape.rows, shape.pairs>(o, row);
  for (; row < o.rows; ++row) outer_rows<1, 4>(o, row);
}

// e^x for x <= 0; nothing where that would leave the normal floats, and for -INFINITY. Keeps NaN.
inline float share(float x) {
  const float e = exponential(x);
  return x < -87.0f ? 0.0f : e;
}

inline float larger(float a, float b) { return b > a ? b : a; }

// kRowsTogether rows, one in each lane.
void weigh_rows(const Softmax& s, int64_t first) {
  constexpr int n = kRowsTogether;
  float top[n], sum[n];
  float* scores = s.scores + first;
  for (int i = 0; i < n; ++i) top[i] = -INFINITY;
  for (int64_t key = 0; key < s.keys; ++key) {
    float* at = scores + key * s.rows;
    if (s.added) {
      const float* added = s.added + key * s.rows + first;
      for (int i = 0; i < n; ++i) at[i] += added[i];
    }
    const int32_t* visible = s.visible + first;
    for (int i = 0; i < n; ++i) at[i] = int32_t(key) < visible[i] ? at[i] : -INFINITY;
    for (int i = 0; i < n; ++i) top[i] = larger(top[i], at[i]);
  }
  float* most = s.most + first;
  for (int i = 0; i < n; ++i) {
    const float before = most[i], now = larger(before, top[i]);
    s.fade[first + i] = before == -INFINITY ? 0.0f : share(before - now);
    most[i] = now;
    top[i] = now == -INFINITY ? 0.0f : now;
    sum[i] = 0.0f;
  }
  for (int64_t key = 0; key < s.keys; ++key) {
    float* at = scores + key * s.rows;
    for (int i = 0; i < n; ++i) {
      at[i] = share(at[i] - top[i]);
      sum[i] += at[i];
    }
  }
  for (int i = 0; i < n; ++i) {
    s.kept[first + i] = sum[i] != 0.0f;
    if (sum[i] != 0.0f) s.total[first + i] = s.total[first + i] * s.fade[first + i] + sum[i];
  }
}

void weigh(const Softmax& s) {
  for (int64_t row = 0; row < s.rows; row += kRowsTogether) weigh_rows(s, row);
}

void blend(float* to, float to_share, const float* from, float from_share, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to[i] * to_share + from[i] * from_share;
}

}  // namespace
}  // namespace flashmoe
