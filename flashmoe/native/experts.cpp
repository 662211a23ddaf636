// fm_expert_forward: gate and up rows together, activated where they lie, then down.

#include <stdint.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "flashmoe_native.h"
#include "grouping.h"
#include "rows.h"

namespace flashmoe {
namespace {

constexpr int64_t kScratchBytes = 8 << 20;

int check_vectors(const fm_vectors& v) {
  if (!v.data) return FM_OK;
  return v.dtype == FM_F32 || v.dtype == FM_BF16 || v.dtype == FM_F16 ? FM_OK : FM_UNSUPPORTED;
}

int check_experts(const fm_experts& e) {
  const bool gated = e.gate.weight;
  const int problems[] = {
      check_matrix(&e.up),       check_matrix(&e.down),
      gated ? check_matrix(&e.gate) : int(FM_OK),
      check_vectors(e.gate_bias), check_vectors(e.up_bias), check_vectors(e.down_bias)};
  for (int problem : problems)
    if (problem) return problem;
  const int kind = e.activation.kind;
  if (kind < FM_SIGMOID || kind > FM_SITU) return FM_UNSUPPORTED;
  if (e.down.cols != e.up.rows || e.down.slots != e.up.slots) return FM_BAD_ARGUMENT;
  if (gated && (e.gate.rows != e.up.rows || e.gate.cols != e.up.cols || e.gate.slots != e.up.slots))
    return FM_BAD_ARGUMENT;
  return FM_OK;
}

// out[i] += the slot's vector, for i in begin .. end - 1 of its n values.
void add_vector(const Kernels& table, const fm_vectors& v, int64_t slot, int64_t n, int64_t begin,
                int64_t end, float* out) {
  const int64_t at = slot * n;
  if (v.dtype == FM_F32) {
    const float* values = static_cast<const float*>(v.data) + at;
    for (int64_t i = begin; i < end; ++i) out[i] += values[i];
    return;
  }
  constexpr int64_t kPart = 64;
  const auto* halves = static_cast<const uint16_t*>(v.data) + at;
  float wide[kPart];
  for (int64_t part = begin; part < end; part += kPart) {
    const int64_t count = end - part < kPart ? end - part : kPart;
    (v.dtype == FM_BF16 ? table.widen_bf16 : table.widen_f16)(halves + part, count, wide);
    for (int64_t i = 0; i < count; ++i) out[part + i] += wide[i];
  }
}

// A matrix of every slot, its vector, and where rows come from and go to, in sorted order.
struct Projection {
  const Kernels& table;
  const fm_matrix& w;
  const fm_vectors& bias;
  std::vector<const float*> in;
  std::vector<float*> out;

  Projection(const Kernels& k, const fm_matrix& matrix, const fm_vectors& vectors, int64_t n)
      : table(k), w(matrix), bias(vectors), in(n), out(n) {}

  void operator()(const Run& run, int64_t begin, int64_t end) const {
    multiply_rows(table, w, {run.slot, run.count, &in[run.first], &out[run.first]}, begin, end);
    if (!bias.data) return;
    for (int64_t i = run.first; i < run.first + run.count; ++i)
      add_vector(table, bias, run.slot, w.rows, begin, end, out[i]);
  }
};

void forward(const float* x, const Order& order, int64_t top_k, const fm_experts& e, float* y,
             float* scratch) {
  const Kernels& table = kernels();
  const bool gated = e.gate.weight;
  const int64_t n_pairs = int64_t(order.pairs.size());
  const int64_t width = e.up.rows, hidden = n_pairs * width;
  Projection gate(table, e.gate, e.gate_bias, n_pairs);
  Projection up(table, e.up, e.up_bias, n_pairs);
  Projection down(table, e.down, e.down_bias, n_pairs);
  for (int64_t i = 0; i < n_pairs; ++i) {
    const int64_t p = order.pairs[i];
    gate.in[i] = up.in[i] = x + p / top_k * e.up.cols;
    // What is activated lies first, with a gate or without.
    down.in[i] = scratch + i * width;
    gate.out[i] = scratch + i * width;
    up.out[i] = scratch + (gated ? hidden : 0) + i * width;
    down.out[i] = y + p * e.down.rows;
  }
  const int64_t products = n_pairs * width * e.up.cols * (gated ? 2 : 1);
  for_each_rows(order, width, products, [&](const Run& run, int64_t begin, int64_t end) {
    if (gated) gate(run, begin, end);
    up(run, begin, end);
    for (int64_t i = run.first; i < run.first + run.count; ++i)
      table.activate(e.activation, gate.out[i] + begin, gated ? up.out[i] + begin : nullptr,
                     end - begin);
  });
  for_each_rows(order, e.down.rows, n_pairs * e.down.rows * width, down);
}

// A prompt has many pairs, and what they need between the products stays in bounds.
void forward_in_parts(const float* x, const int32_t* slots, int64_t n_pairs, int64_t top_k,
                      const fm_experts& e, float* y) {
  const int64_t pair_bytes = 2 * std::max<int64_t>(e.up.rows, 1) * int64_t(sizeof(float));
  const int64_t most = std::clamp(kScratchBytes / pair_bytes, int64_t(1), n_pairs);
  const std::unique_ptr<float[]> scratch(new float[2 * most * e.up.rows]);
  const Order order(slots, n_pairs);
  if (most == n_pairs) return forward(x, order, top_k, e, y, scratch.get());
  for (int64_t first = 0; first < n_pairs; first += most)
    forward(x, order.part(first, std::min(most, n_pairs - first)), top_k, e, y, scratch.get());
}

}  // namespace
}  // namespace flashmoe

int fm_expert_forward(const float* x, const int32_t* slots, int64_t n_tokens, int64_t top_k,
                      const fm_experts* experts, float* y) {
  using namespace flashmoe;
  if (!x || !slots || !experts || !y || n_tokens < 0 || top_k < 1) return FM_BAD_ARGUMENT;
  const int64_t n_pairs = n_tokens * top_k;
  int problem = check_experts(*experts);
  if (!problem) problem = check_slots(slots, n_pairs, experts->up);
  if (problem) return problem;
  try {
    if (n_pairs) forward_in_parts(x, slots, n_pairs, top_k, *experts, y);
  } catch (const std::exception&) {
    return FM_NO_RESOURCES;
  }
  return FM_OK;
}
