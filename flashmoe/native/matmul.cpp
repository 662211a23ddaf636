// fm_matmul: one matrix of each slot with the rows of x that were paired with it.

#include <stdint.h>

#include <algorithm>
#include <exception>
#include <vector>

#include "dispatch.h"
#include "flashmoe_native.h"
#include "grouping.h"
#include "rows.h"

namespace flashmoe {
namespace {

void multiply(const float* x, const int32_t* x_rows, const int32_t* slots, int64_t n_pairs,
              const fm_matrix& w, float* y) {
  const Kernels& table = kernels();
  const Order order(slots, n_pairs);
  std::vector<const float*> in(n_pairs);
  std::vector<float*> out(n_pairs);
  for (int64_t i = 0; i < n_pairs; ++i) {
    const int64_t p = order.pairs[i];
    in[i] = x + (x_rows ? x_rows[p] : p) * w.cols;
    out[i] = y + p * w.rows;
  }
  const auto work = [&](const Run& run, int64_t begin, int64_t end) {
    multiply_rows(table, w, {run.slot, run.count, &in[run.first], &out[run.first]}, begin, end);
  };
  for_each_rows(order, w.rows, n_pairs * w.rows * w.cols, work);
}

}  // namespace
}  // namespace flashmoe

int fm_matmul(const float* x, const int32_t* x_rows, const int32_t* slots, int64_t n_pairs,
              const fm_matrix* w, float* y) {
  using namespace flashmoe;
  if (n_pairs < 0 || !x || !y) return FM_BAD_ARGUMENT;
  int problem = check_matrix(w);
  if (!problem) problem = check_slots(slots, n_pairs, *w);
  if (problem) return problem;
  const auto negative = [](int32_t row) { return row < 0; };
  if (x_rows && std::any_of(x_rows, x_rows + n_pairs, negative)) return FM_BAD_ARGUMENT;
  try {
    multiply(x, x_rows, slots, n_pairs, *w, y);
  } catch (const std::exception&) {
    return FM_NO_RESOURCES;
  }
  return FM_OK;
}

const char* fm_version(void) { return "5"; }
