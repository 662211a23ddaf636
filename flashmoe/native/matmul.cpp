// fm_matmul: arguments checked, pairs grouped by slot, rows shared out over threads.

#include <stdint.h>

#include <algorithm>
#include <exception>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "flashmoe_native.h"
#include "pool.h"
#include "rows.h"

namespace flashmoe {
namespace {

// Below this many multiplications another thread costs more than it brings.
constexpr int64_t kWorthSharing = 1 << 16;
constexpr int64_t kRowsAtOnce = 128;

bool is_float_dtype(int32_t dtype) {
  return dtype == FM_F32 || dtype == FM_BF16 || dtype == FM_F16;
}

int check(const float* x, int64_t n_pairs, const fm_matrix* w, const float* y) {
  if (!w || n_pairs < 0 || w->rows < 0 || w->cols < 0) return FM_BAD_ARGUMENT;
  if (!x || !y || !w->weight) return FM_BAD_ARGUMENT;
  if (is_float_dtype(w->format)) return FM_OK;
  if (w->format == FM_AFFINE) {
    const int b = w->bits, g = w->group_size;
    if (b < 2 || b > 8 || b == 7 || (g != 32 && g != 64 && g != 128)) return FM_UNSUPPORTED;
    if (!is_float_dtype(w->scale_dtype)) return FM_UNSUPPORTED;
    if (!w->biases) return FM_BAD_ARGUMENT;
  } else if (w->format != FM_MXFP4 || w->bits != 4 || w->group_size != 32) {
    return FM_UNSUPPORTED;
  }
  return w->scales && w->cols % w->group_size == 0 ? FM_OK : FM_BAD_ARGUMENT;
}

// Pairs sorted by slot, stably.
struct Grouping {
  std::vector<const float*> x;
  std::vector<float*> y;
  std::vector<Group> groups;

  Grouping(const float* x_base, const int32_t* x_rows, const int32_t* slots, int64_t n_pairs,
           const fm_matrix& w, float* y_base)
      : x(n_pairs), y(n_pairs) {
    std::vector<std::pair<int32_t, int64_t>> order(n_pairs);
    for (int64_t p = 0; p < n_pairs; ++p) order[p] = {slots ? slots[p] : 0, p};
    std::sort(order.begin(), order.end());
    for (int64_t i = 0; i < n_pairs; ++i) {
      const auto [slot, p] = order[i];
      x[i] = x_base + (x_rows ? x_rows[p] : p) * w.cols;
      y[i] = y_base + p * w.rows;
      if (i == 0 || slot != order[i - 1].first) groups.push_back({slot, 0, &x[i], &y[i]});
      ++groups.back().count;
    }
  }
};

bool any_negative(const int32_t* values, int64_t n) {
  return values && std::any_of(values, values + n, [](int32_t v) { return v < 0; });
}

void multiply(const Grouping& grouping, int64_t n_pairs, const fm_matrix& w) {
  const Kernels& table = kernels();
  const int64_t n_groups = int64_t(grouping.groups.size());
  const bool alone = n_pairs * w.rows * w.cols < kWorthSharing;
  // Enough parts for threads to finish together, each of whole tiles.
  const int64_t wanted = w.rows * n_groups / (8 * int64_t(fm_threads()));
  const int64_t unit = std::clamp(wanted / kMaxRows * kMaxRows, int64_t(kMaxRows), kRowsAtOnce);
  const int64_t parts = (w.rows + unit - 1) / unit;
  const auto work = [&](int64_t item) {
    const Group& group = grouping.groups[item / parts];
    const int64_t begin = item % parts * unit;
    multiply_rows(table, w, group, begin, std::min(begin + unit, w.rows));
  };
  if (!alone) return run_parallel(n_groups * parts, work);
  for (int64_t item = 0; item < n_groups * parts; ++item) work(item);
}

}  // namespace
}  // namespace flashmoe

int fm_matmul(const float* x, const int32_t* x_rows, const int32_t* slots, int64_t n_pairs,
              const fm_matrix* w, float* y) {
  using namespace flashmoe;
  const int problem = check(x, n_pairs, w, y);
  if (problem) return problem;
  if (any_negative(slots, n_pairs) || any_negative(x_rows, n_pairs)) return FM_BAD_ARGUMENT;
  if (n_pairs == 0 || w->rows == 0) return FM_OK;
  if (w->cols == 0) {
    std::fill(y, y + n_pairs * w->rows, 0.0f);
    return FM_OK;
  }
  try {
    multiply(Grouping(x, x_rows, slots, n_pairs, *w, y), n_pairs, *w);
  } catch (const std::exception&) {
    return FM_NO_RESOURCES;
  }
  return FM_OK;
}

const char* fm_version(void) { return "2"; }
