// The part of native_check that is about attention, on buffers of the exact size.

#include <float.h>
#include <math.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "flashmoe_native.h"
#include "native_check.h"

namespace {

struct Shape {
  int64_t batch, heads, kv_heads, queries, keys, k_dim, v_dim;
};

struct Floats {
  Buffer buffer;
  float* at;
  explicit Floats(int64_t n) : buffer(n * 4), at(reinterpret_cast<float*>(buffer.bytes)) {
    for (int64_t i = 0; i < n; ++i) at[i] = random_float();
  }
};

// One row in float64.
std::vector<double> expected(const fm_attention& a, int64_t b, int64_t h, int64_t i) {
  const int64_t kv = h / (a.heads / a.kv_heads);
  std::vector<double> scores(a.keys + 1, -HUGE_VAL), y(a.v_dim, 0.0);
  for (int64_t j = 0; j < a.keys; ++j) {
    double sum = 0;
    for (int64_t d = 0; d < a.k_dim; ++d)
      sum += double(a.q[b * a.q_strides[0] + h * a.q_strides[1] + i * a.q_strides[2] + d]) *
             a.k[b * a.k_strides[0] + kv * a.k_strides[1] + j * a.k_strides[2] + d];
    sum *= a.scale;
    const int64_t at = b * a.mask_strides[0] + h * a.mask_strides[1] + i * a.mask_strides[2] +
                       j * a.mask_strides[3];
    if (a.mask_kind == FM_CAUSAL_MASK && j > a.keys - a.queries + i) continue;
    if (a.mask_kind == FM_BOOLEAN_MASK && !static_cast<const uint8_t*>(a.mask)[at]) sum = -1e30;
    if (a.mask_kind == FM_ADDED_MASK) sum += static_cast<const float*>(a.mask)[at];
    scores[j] = sum;
  }
  if (a.sinks) scores[a.keys] = a.sinks[h];
  const double most = *std::max_element(scores.begin(), scores.end());
  double total = 0;
  for (double& score : scores) total += score = exp(score - most);
  for (int64_t j = 0; j < a.keys; ++j)
    for (int64_t d = 0; d < a.v_dim; ++d)
      y[d] += scores[j] / total *
              a.v[b * a.v_strides[0] + kv * a.v_strides[1] + j * a.v_strides[2] + d];
  return y;
}

double error_of(const Shape& s, int kind, bool sinks) {
  // Keys lie in a cache that has room for more, queries between other heads' as projections do.
  const int64_t room = s.keys + 3, rows = s.batch * s.queries * s.heads;
  Floats q(rows * s.k_dim), k(s.batch * s.kv_heads * room * s.k_dim),
      v(s.batch * s.kv_heads * room * s.v_dim), added(s.heads * s.queries * s.keys), sink(s.heads);
  Buffer seen(s.queries * s.keys), out(rows * s.v_dim * 4), some(s.batch * s.heads * s.v_dim * 4);
  for (int64_t i = 0; i < s.queries * s.keys; ++i) seen.bytes[i] = i >= s.keys && i % 3 != 0;
  fm_attention a = {};
  a.q = q.at, a.k = k.at, a.v = v.at;
  a.sinks = sinks ? sink.at : nullptr;
  const int64_t q_strides[4] = {s.queries * s.heads * s.k_dim, s.k_dim, s.heads * s.k_dim, 1};
  const int64_t k_strides[4] = {s.kv_heads * room * s.k_dim, room * s.k_dim, s.k_dim, 1};
  const int64_t v_strides[4] = {s.kv_heads * room * s.v_dim, room * s.v_dim, s.v_dim, 1};
  memcpy(a.q_strides, q_strides, sizeof q_strides);
  memcpy(a.k_strides, k_strides, sizeof k_strides);
  memcpy(a.v_strides, v_strides, sizeof v_strides);
  a.batch = s.batch, a.heads = s.heads, a.kv_heads = s.kv_heads;
  a.queries = s.queries, a.keys = s.keys, a.k_dim = s.k_dim, a.v_dim = s.v_dim;
  a.scale = 0.5f;
  a.mask_kind = kind;
  if (kind == FM_BOOLEAN_MASK) a.mask = seen.bytes;
  if (kind == FM_ADDED_MASK) a.mask = added.at;
  a.mask_strides[1] = kind == FM_ADDED_MASK ? s.queries * s.keys : 0;
  a.mask_strides[2] = s.keys, a.mask_strides[3] = 1;
  auto* ys = reinterpret_cast<float*>(out.bytes);
  fm_set_threads(1);
  if (fm_attend(&a, ys) != FM_OK) return INFINITY;
  double worst = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const std::vector<double> y =
        expected(a, row / s.heads / s.queries, row % s.heads, row / s.heads % s.queries);
    for (int64_t d = 0; d < s.v_dim; ++d) {
      const double error = fabs(ys[row * s.v_dim + d] - y[d]);
      worst = error < worst ? worst : error;
    }
  }
  // The last query alone, with more threads than there are rows.
  const int64_t last = s.queries - 1;
  a.q += last * q_strides[2];
  a.queries = 1;
  if (kind == FM_BOOLEAN_MASK) a.mask = seen.bytes + last * s.keys;
  if (kind == FM_ADDED_MASK) a.mask = added.at + last * s.keys;
  fm_set_threads(7);
  auto* alone = reinterpret_cast<float*>(some.bytes);
  if (fm_attend(&a, alone) != FM_OK) return INFINITY;
  for (int64_t b = 0; b < s.batch; ++b) {
    const float* beside = ys + ((b + 1) * s.queries - 1) * s.heads * s.v_dim;
    if (memcmp(alone + b * s.heads * s.v_dim, beside, s.heads * s.v_dim * 4)) return INFINITY;
  }
  return worst;
}

}  // namespace

double attention_error() {
  const Shape shapes[] = {{1, 1, 1, 1, 1, 1, 1},      {2, 4, 2, 3, 5, 8, 7},
                          {1, 2, 1, 33, 70, 20, 33},  {1, 8, 1, 1, 1100, 16, 16},
                          {1, 6, 2, 40, 600, 36, 12}, {1, 3, 3, 70, 70, 24, 48}};
  double worst = 0;
  for (const Shape& shape : shapes)
    for (int kind : {FM_NO_MASK, FM_CAUSAL_MASK, FM_BOOLEAN_MASK, FM_ADDED_MASK})
      for (bool sinks : {false, true}) {
        const double error = error_of(shape, kind, sinks);
        worst = error < worst ? worst : error;
      }
  fm_set_threads(0);
  return worst;
}
