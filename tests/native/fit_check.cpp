// Fitting groups, on buffers of the exact size: never further off than the candidate that was
// given, whatever the weights.

#include <math.h>
#include <stdint.h>

#include <vector>

#include "flashmoe_fit.h"
#include "native_check.h"

namespace {

constexpr int64_t kGroups = 300;

double error_of(const float* w, const uint32_t* codes, int n, int bits, float scale, float bias) {
  double sum = 0;
  for (int i = 0; i < n; ++i) {
    const int at = i * bits, word = at / 32, shift = at % 32;
    uint64_t pair = codes[word];
    if (shift + bits > 32) pair |= uint64_t(codes[word + 1]) << 32;
    const double code = double(pair >> shift & ((1u << bits) - 1));
    sum += pow(fabs(code * double(scale) + double(bias) - double(w[i])), 2.5);
  }
  return sum;
}

}  // namespace

bool fits_well() {
  const float starts[] = {1.0f, 0.7f};
  for (const int bits : {2, 3, 4, 5, 6, 8})
    for (const int n : {32, 64, 128})
      for (const int dtype : {FM_F32, FM_BF16, FM_F16}) {
        std::vector<float> w(kGroups * n), scales(kGroups), biases(kGroups);
        for (float& value : w) value = float(int(random_bits() >> 22) - 512) / 4096.0f;
        for (int i = 0; i < n; ++i) {
          w[i] = 0.25f;
          w[n + i] = i ? w[n + i] : NAN;
          w[2 * n + i] = i ? w[2 * n + i] : INFINITY;
          w[3 * n + i] *= 1e30f;
        }
        std::vector<uint32_t> codes(kGroups * n * bits / 32);
        const fm_fit fit = {bits, n, dtype, 10, 2, starts, 0.01f};
        if (fm_fit_groups(w.data(), kGroups, &fit, codes.data(), scales.data(), biases.data()))
          return false;
        const int64_t words = n * bits / 32;
        for (int64_t group = 0; group < kGroups; ++group) {
          if (group == 1 || group == 2) continue;  // anything, as long as it is nowhere else
          const float* at = &w[group * n];
          double candidate = 0;  // all zeros
          for (int i = 0; i < n; ++i) candidate += pow(fabs(double(at[i])), 2.5);
          const double error =
              error_of(at, &codes[group * words], n, bits, scales[group], biases[group]);
          if (!(error <= candidate * (1 + 1e-4)) || (group > 3 && error > 0.5 * candidate))
            return false;
        }
      }
  float w[32] = {}, scale = 0, bias = 0;
  uint32_t codes[8];
  const fm_fit odd = {7, 32, FM_F32, 1, 2, starts, 0.01f};
  const fm_fit without = {2, 32, FM_F32, 1, 2, nullptr, 0.01f};
  return fm_fit_groups(w, 1, &odd, codes, &scale, &bias) == FM_UNSUPPORTED &&
         fm_fit_groups(w, 1, &without, codes, &scale, &bias) == FM_BAD_ARGUMENT &&
         fm_fit_groups(nullptr, 1, &odd, codes, &scale, &bias) == FM_BAD_ARGUMENT;
}
