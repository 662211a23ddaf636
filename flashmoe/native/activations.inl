// The activations, included by kernels.inl: plain loops without branches, which the compiler turns
// into the vectors of the file that includes them, and without fused operations, so that every
// instruction set gives the same bits.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace flashmoe {
namespace {

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// e^x to 2 units in the last place; x is cut off where the result would leave the normal floats.
// Cody and Waite's reduction; the polynomial is Cephes' expf (Moshier).
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  uint32_t n_bits;
  memcpy(&n_bits, &shifted, sizeof n_bits);
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return ((p * r) * r + r + 1.0f) * bits_to_float((n_bits + 127u) << 23);
}

inline float clip(float x, float limit) {
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Near zero an odd polynomial (Cephes' tanhf), because 1 - e^-2x cancels there.
inline float hyperbolic_tangent(float x) {
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  const float size = x < 0.0f ? -x : x;
  const float e = exponential(-2.0f * size);
  const float far = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? p * z * x + x : x < 0.0f ? -far : far;
}

struct Sigmoid {
  float alpha;
  float operator()(float g) const { return g * sigmoid(alpha * g); }
};
struct GeluTanh {
  // (1 + tanh z) / 2 is sigmoid(2 z).
  float operator()(float g) const {
    return g * sigmoid(1.5957691216f * (g + 0.044715f * (g * g * g)));
  }
};
struct Relu2 {
  float operator()(float g) const {
    const float positive = g < 0.0f ? 0.0f : g;
    return positive * positive;
  }
};

struct Situ {
  float alpha;
  float operator()(float g) const { return alpha * hyperbolic_tangent(g / alpha) * sigmoid(g); }
};

template <class Function>
void activate_with(Function function, const fm_activation& a, float* gate, const float* up,
                   int64_t n) {
  const float gate_max = a.gate_max, activated_max = a.activated_max;
  for (int64_t i = 0; i < n; ++i) {
    const float activated = function(gate[i] > gate_max ? gate_max : gate[i]);
    gate[i] = activated > activated_max ? activated_max : activated;
  }
  if (!up) return;
  const float up_max = a.up_max, up_bound = a.up_bound, up_shift = a.up_shift;
  if (up_bound < INFINITY) {
    for (int64_t i = 0; i < n; ++i)
      gate[i] *= up_bound * hyperbolic_tangent(clip(up[i], up_max) / up_bound) + up_shift;
    return;
  }
  for (int64_t i = 0; i < n; ++i) gate[i] *= clip(up[i], up_max) + up_shift;
}

void activate(const fm_activation& a, float* gate, const float* up, int64_t n) {
  if (a.kind == FM_SIGMOID) return activate_with(Sigmoid{a.alpha}, a, gate, up, n);
  if (a.kind == FM_GELU_TANH) return activate_with(GeluTanh{}, a, gate, up, n);
  if (a.kind == FM_SITU) return activate_with(Situ{a.alpha}, a, gate, up, n);
  activate_with(Relu2{}, a, gate, up, n);
}

}  // namespace
}  // namespace flashmoe
