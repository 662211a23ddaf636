// The activations of expert modules, in float32.

#pragma once

#include <metal_stdlib>

using namespace metal;

namespace flashmoe {

constant constexpr int SIGMOID = 0;
constant constexpr int GELU_TANH = 1;
constant constexpr int RELU2 = 2;
constant constexpr int SITU = 3;

// What the function is given besides gate and up. A limit that there is not is 3.4e38.
constant constexpr int ALPHA = 0;
constant constexpr int GATE_MAX = 1;
constant constexpr int ACTIVATED_MAX = 2;
constant constexpr int UP_MAX = 3;
constant constexpr int UP_BOUND = 4;
constant constexpr int UP_SHIFT = 5;
constant constexpr float NO_LIMIT = 3.0e38f;

METAL_FUNC float sigmoid(float x) { return 1.0f / (1.0f + precise::exp(-x)); }

// Comparisons instead of min, which would turn NaN into the limit.
METAL_FUNC float at_most(float x, float limit) { return x > limit ? limit : x; }

METAL_FUNC float activated(int kind, const constant float* limits, float gate) {
  const float alpha = limits[ALPHA];
  const float g = at_most(gate, limits[GATE_MAX]);
  float a;
  if (kind == SIGMOID) {
    a = g * sigmoid(alpha * g);
  } else if (kind == GELU_TANH) {
    // (1 + tanh z) / 2 is sigmoid(2 z).
    a = g * sigmoid(1.5957691216f * (g + 0.044715f * (g * g * g)));
  } else if (kind == SITU) {
    a = alpha * precise::tanh(g / alpha) * sigmoid(g);
  } else {
    a = g < 0.0f ? 0.0f : g * g;
  }
  return at_most(a, limits[ACTIVATED_MAX]);
}

METAL_FUNC float activated(int kind, const constant float* limits, float gate, float up) {
  const float bound = limits[UP_BOUND];
  float u = -at_most(-at_most(up, limits[UP_MAX]), limits[UP_MAX]);
  if (bound < NO_LIMIT) u = bound * precise::tanh(u / bound);
  return activated(kind, limits, gate) * (u + limits[UP_SHIFT]);
}

}  // namespace flashmoe
