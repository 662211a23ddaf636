#include "grouping.h"

#include <algorithm>
#include <utility>

#include "pool.h"

namespace flashmoe {
namespace {

// Below this many multiplications another thread costs more than it brings.
constexpr int64_t kWorthSharing = 1 << 18;
constexpr int64_t kRowsAtOnce = 128;

bool is_float_dtype(int32_t dtype) {
  return dtype == FM_F32 || dtype == FM_BF16 || dtype == FM_F16;
}

}  // namespace

int check_matrix(const fm_matrix* w) {
  if (!w || w->slots < 0 || w->rows < 0 || w->cols < 0 || !w->weight) return FM_BAD_ARGUMENT;
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

int check_slots(const int32_t* slots, int64_t n_pairs, const fm_matrix& w) {
  if (!slots) return n_pairs == 0 || w.slots > 0 ? FM_OK : FM_BAD_ARGUMENT;
  const auto bad = [&](int32_t slot) { return slot < 0 || slot >= w.slots; };
  return std::any_of(slots, slots + n_pairs, bad) ? FM_BAD_ARGUMENT : FM_OK;
}

Order::Order(const int32_t* slots, int64_t n_pairs) : pairs(n_pairs) {
  std::vector<std::pair<int32_t, int64_t>> sorted(n_pairs);
  for (int64_t p = 0; p < n_pairs; ++p) sorted[p] = {slots ? slots[p] : 0, p};
  std::sort(sorted.begin(), sorted.end());
  for (int64_t i = 0; i < n_pairs; ++i) {
    const auto [slot, p] = sorted[i];
    pairs[i] = p;
    if (i == 0 || slot != sorted[i - 1].first) runs.push_back({slot, i, 0});
    ++runs.back().count;
  }
}

Order Order::part(int64_t first, int64_t count) const {
  Order order;
  order.pairs.assign(pairs.begin() + first, pairs.begin() + first + count);
  for (const Run& run : runs) {
    const int64_t begin = std::max(run.first, first);
    const int64_t end = std::min(run.first + run.count, first + count);
    if (begin < end) order.runs.push_back({run.slot, begin - first, end - begin});
  }
  return order;
}

void for_each_rows(const Order& order, int64_t rows, int64_t products,
                   const std::function<void(const Run&, int64_t, int64_t)>& work) {
  const int64_t n_runs = int64_t(order.runs.size());
  // Enough parts for threads to finish together, each of whole tiles.
  const int64_t wanted = rows * n_runs / (8 * int64_t(fm_threads()));
  const int64_t unit = std::clamp(wanted / kMaxRows * kMaxRows, int64_t(kMaxRows), kRowsAtOnce);
  const int64_t parts = (rows + unit - 1) / unit;
  const auto item = [&](int64_t i) {
    const int64_t begin = i % parts * unit;
    work(order.runs[i / parts], begin, std::min(begin + unit, rows));
  };
  if (products >= kWorthSharing) return run_parallel(n_runs * parts, item);
  for (int64_t i = 0; i < n_runs * parts; ++i) item(i);
}

}  // namespace flashmoe
