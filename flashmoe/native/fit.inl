// Affine codes of one group, once for every instruction set; loops over kFitLanes are what
// compilers turn into vectors.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace flashmoe {
namespace {

constexpr int kFitLanes = 16;
constexpr int kMostWeights = 128;
// Added and taken away, rounds to nearest even.
constexpr float kRounder = 12582912.0f;

struct LaneSum {
  float at[kFitLanes] = {};
  double total() const {
    double sum = 0;
    for (int l = 0; l < kFitLanes; ++l) sum += double(at[l]);
    return sum;
  }
};

float as_stored(float value, int dtype) {
  if (dtype == FM_F32 || !isfinite(value)) return value;
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (dtype == FM_F16 && fabsf(value) < 6.103515625e-05f) {  // subnormal: multiples of 2^-24
    volatile const float moved = fabsf(value) + 0.5f;
    return copysignf(moved - 0.5f, value);
  }
  const int dropped = dtype == FM_BF16 ? 16 : 13;
  bits += (1u << (dropped - 1)) - 1 + ((bits >> dropped) & 1);
  bits &= ~((1u << dropped) - 1);
  memcpy(&value, &bits, sizeof bits);
  return dtype == FM_F16 && fabsf(value) > 65504.0f ? copysignf(INFINITY, value) : value;
}

// The code of each weight; 0 for what is no number.
void nearest_codes(const float* w, int n, float scale, float bias, float levels, float* codes) {
  const float inverse = scale == 0.0f ? 1.0f : 1.0f / scale;
  for (int i = 0; i < n; ++i) {
    float t = (w[i] - bias) * inverse;
    t = t > 0.0f ? t : 0.0f;
    t = t < levels ? t : levels;
    codes[i] = (t + kRounder) - kRounder;
  }
}

// Weighted least squares of w over codes, which are those nearest to (scale, bias).
void refit(const float* w, int n, float least, float levels, float& scale, float& bias) {
  LaneSum d, dq, dw, dqq, dqw;
  float codes[kMostWeights];
  nearest_codes(w, n, scale, bias, levels, codes);
  for (int i = 0; i < n; i += kFitLanes) {
    for (int l = 0; l < kFitLanes; ++l) {
      const float value = w[i + l], code = codes[i + l];
      const float weight = sqrtf(fabsf(code * scale + bias - value) + least);
      const float weighted = weight * code;
      d.at[l] += weight;
      dq.at[l] += weighted;
      dw.at[l] += weight * value;
      dqq.at[l] += weighted * code;
      dqw.at[l] += weighted * value;
    }
  }
  const double total = d.total(), code_sum = dq.total(), w_sum = dw.total();
  const double all = dqq.total();
  const double squares = all - code_sum * code_sum / total;
  if (!(squares > 1e-6 * all)) return;
  const double fitted = (dqw.total() - code_sum * w_sum / total) / squares;
  scale = float(fitted);
  bias = float((w_sum - fitted * code_sum) / total);
}

double error_of(const float* w, const float* codes, int n, float scale, float bias) {
  LaneSum sum;
  for (int i = 0; i < n; i += kFitLanes) {
    for (int l = 0; l < kFitLanes; ++l) {
      const float off = fabsf(codes[i + l] * scale + bias - w[i + l]);
      sum.at[l] += off * off * sqrtf(off);
    }
  }
  return sum.total();
}

void pack_group(const float* codes, int n, int bits, uint32_t* out) {
  uint64_t held = 0;
  int filled = 0;
  for (int i = 0; i < n; ++i) {
    held |= uint64_t(codes[i]) << filled;
    filled += bits;
    if (filled < 32) continue;
    *out++ = uint32_t(held);
    held >>= 32;
    filled -= 32;
  }
}

void fit_group(const float* w, const fm_fit& fit, uint32_t* packed, float* scale_out,
               float* bias_out) {
  const int n = fit.group_size;
  const float levels = float((1 << fit.bits) - 1);
  float centred[kMostWeights], codes[kMostWeights], best_codes[kMostWeights];

  float best_scale = *scale_out, best_bias = *bias_out;
  nearest_codes(w, n, best_scale, best_bias, levels, best_codes);
  double best = error_of(w, best_codes, n, best_scale, best_bias);
  if (!(best >= 0)) best = INFINITY;

  double total = 0, spread = 0;
  float low = w[0], high = w[0];
  for (int i = 0; i < n; ++i) {
    total += double(w[i]);
    low = w[i] < low ? w[i] : low;
    high = w[i] > high ? w[i] : high;
  }
  const double mean = total / n;
  for (int i = 0; i < n; ++i) {
    centred[i] = float(double(w[i]) - mean);
    spread += double(centred[i]) * double(centred[i]);
  }
  const float step = (high - low) / levels;
  const float middle = float((double(low) + double(high)) / 2 - mean);
  for (int start = 0; start < fit.n_starts; ++start) {
    float scale = step * fit.starts[start];
    float bias = middle - scale * (levels / 2);
    for (int round = 0; round < fit.rounds; ++round)
      refit(centred, n, fit.least_residual * step, levels, scale, bias);
    nearest_codes(centred, n, scale, bias, levels, codes);
    double code_sum = 0, code_squares = 0;
    for (int i = 0; i < n; ++i) {
      code_sum += double(codes[i]);
      code_squares += double(codes[i]) * double(codes[i]);
    }
    const double squares = code_squares - code_sum * code_sum / n;
    if (squares > 0) scale = copysignf(float(sqrt(spread / squares)), scale);
    scale = as_stored(scale, fit.scale_dtype);
    bias = as_stored(float(mean - double(scale) * (code_sum / n)), fit.scale_dtype);
    const double error = error_of(w, codes, n, scale, bias);
    if (!(error < best)) continue;
    best = error;
    best_scale = scale;
    best_bias = bias;
    memcpy(best_codes, codes, n * sizeof *codes);
  }
  pack_group(best_codes, n, fit.bits, packed);
  *scale_out = best_scale;
  *bias_out = best_bias;
}

}  // namespace
}  // namespace flashmoe
