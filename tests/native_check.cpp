// Products in every format on every instruction set here, against float64, on heap buffers of the
// exact size: meant to be compiled with sanitizers. Prints what it did; exit status 1 on an error.

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <thread>
#include <vector>

#include "flashmoe_native.h"

namespace {

uint32_t state = 1;
uint32_t random_bits() { return state = state * 1664525u + 1013904223u; }
float random_float() { return float(random_bits() >> 8) / 8388608.0f - 1.0f; }

// Buffers that end where an overrun is noticed.
struct Buffer {
  uint8_t* bytes;
  explicit Buffer(int64_t size) : bytes(static_cast<uint8_t*>(malloc(size))) {
    for (int64_t i = 0; i < size; ++i) bytes[i] = uint8_t(random_bits() >> 24);
  }
  ~Buffer() { free(bytes); }
  Buffer(const Buffer&) = delete;
};

int64_t bytes_of(int dtype) { return dtype == FM_F32 ? 4 : 2; }

// Writes a value that is exact in every dtype, and gives it back.
float put(uint8_t* at, int dtype) {
  const float value = float(int(random_bits() >> 25) - 64) / 32.0f;
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (dtype == FM_F32) {
    memcpy(at, &bits, 4);
  } else {
    const uint32_t exponent = bits >> 23 & 255;
    const uint32_t half = exponent ? (exponent - 112) << 10 | (bits >> 13 & 1023) : 0;
    const uint16_t stored =
        uint16_t(dtype == FM_BF16 ? bits >> 16 : (bits >> 16 & 0x8000) | half);
    memcpy(at, &stored, 2);
  }
  return value;
}

struct Case {
  int format, bits, group_size, dtype;
  int64_t rows, cols, pairs;
};

// The largest error of a product as a share of |x| |w|.
double worst_error(const Case& c) {
  const int64_t slots = 3, values = c.rows * c.cols;
  const bool floats = c.format <= FM_F16;
  const int64_t groups = floats ? 0 : values / c.group_size;
  const int64_t slot_bytes = floats ? values * bytes_of(c.format) : values * c.bits / 8;
  const int64_t scale_bytes = c.format == FM_MXFP4 ? groups : groups * bytes_of(c.dtype);
  Buffer weight(slots * slot_bytes), scales(slots * scale_bytes), biases(slots * scale_bytes);
  std::vector<double> w(slots * values);
  static const double e2m1[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6};
  if (floats) {
    for (int64_t i = 0; i < slots * values; ++i)
      w[i] = put(weight.bytes + i * bytes_of(c.format), c.format);
  } else {
    for (int64_t g = 0; g < slots * groups; ++g) {
      double scale, bias = 0;
      if (c.format == FM_MXFP4) {
        scales.bytes[g] = uint8_t(120 + g % 9);
        scale = ldexp(1.0, scales.bytes[g] - 127);
      } else {
        scale = put(scales.bytes + g * bytes_of(c.dtype), c.dtype);
        bias = put(biases.bytes + g * bytes_of(c.dtype), c.dtype);
      }
      for (int64_t i = g * c.group_size; i < (g + 1) * c.group_size; ++i) {
        int q = 0;
        for (int b = 0; b < c.bits; ++b) {
          const int64_t bit = i * c.bits + b;
          q |= (weight.bytes[bit / 8] >> bit % 8 & 1) << b;
        }
        w[i] = scale * (c.format == FM_MXFP4 ? e2m1[q] : q) + bias;
      }
    }
  }
  Buffer x(c.pairs * c.cols * 4), y(c.pairs * c.rows * 4);
  auto* xs = reinterpret_cast<float*>(x.bytes);
  auto* ys = reinterpret_cast<float*>(y.bytes);
  for (int64_t i = 0; i < c.pairs * c.cols; ++i) xs[i] = random_float();
  std::vector<int32_t> slot_of(c.pairs), row_of(c.pairs);
  for (int64_t p = 0; p < c.pairs; ++p) {
    // Slot 1 has most pairs, so that every path is taken.
    slot_of[p] = p % 8 == 1 ? 2 : p % 16 == 3 ? 0 : 1;
    row_of[p] = int32_t(c.pairs - 1 - p);
  }
  const fm_matrix m = {slots, weight.bytes, floats ? nullptr : scales.bytes,
                       c.format == FM_AFFINE ? biases.bytes : nullptr,
                       slot_bytes, scale_bytes, scale_bytes, c.rows, c.cols,
                       c.format, c.bits, c.group_size, c.dtype};
  if (fm_matmul(xs, row_of.data(), slot_of.data(), c.pairs, &m, ys) != FM_OK) return INFINITY;
  double worst = 0;
  for (int64_t p = 0; p < c.pairs; ++p) {
    for (int64_t r = 0; r < c.rows; ++r) {
      const double* row = &w[slot_of[p] * values + r * c.cols];
      double sum = 0, xx = 0, ww = 0;
      for (int64_t i = 0; i < c.cols; ++i) {
        const double xi = xs[row_of[p] * c.cols + i];
        sum += row[i] * xi;
        xx += xi * xi;
        ww += row[i] * row[i];
      }
      const double error = fabs(ys[p * c.rows + r] - sum) / (sqrt(xx * ww) + 1e-30);
      worst = error < worst ? worst : error;  // keeps a NaN
    }
  }
  return worst;
}

}  // namespace

int main() {
  std::vector<Case> cases;
  const struct { int64_t rows, cols, pairs; } sizes[] = {
      {1, 128, 1}, {13, 256, 3}, {5, 2176, 20}, {19, 384, 130}};
  for (const auto& s : sizes) {
    for (int bits : {2, 3, 4, 5, 6, 8})
      for (int group : {32, 64, 128})
        for (int dtype : {FM_F32, FM_BF16, FM_F16})
          cases.push_back({FM_AFFINE, bits, group, dtype, s.rows, s.cols, s.pairs});
    cases.push_back({FM_MXFP4, 4, 32, 0, s.rows, s.cols, s.pairs});
    for (int format : {FM_F32, FM_BF16, FM_F16})
      for (int64_t extra : {-127, -3, 0, 1, 5})
        cases.push_back({format, 0, 0, 0, s.rows, s.cols + extra, s.pairs});
  }
  bool good = true;
  for (const char* isa : {"avx512", "avx2", "neon", "portable"}) {
    if (fm_use_isa(isa) != FM_OK) continue;
    double worst = 0;
    for (size_t i = 0; i < cases.size(); ++i) {
      fm_set_threads(int(i % 4));
      const double error = worst_error(cases[i]);
      if (!(error < 3e-7)) {
        const Case& c = cases[i];
        fprintf(stderr, "%s: format %d bits %d group %d dtype %d [%d, %d] %d pairs: error %g\n",
                isa, c.format, c.bits, c.group_size, c.dtype, int(c.rows), int(c.cols),
                int(c.pairs), error);
        good = false;
      }
      worst = error < worst ? worst : error;
    }
    printf("%s %zu cases, worst error %.1e of |x| |w|\n", isa, cases.size(), worst);
  }
  // Callers from several threads take turns.
  fm_set_threads(3);
  std::vector<std::thread> callers;
  double errors[4] = {};
  for (double& error : errors)
    callers.emplace_back([&error] {
      std::vector<float> x(2048, 1.0f), y(64), w(64 * 2048, 0.5f);
      const fm_matrix m = {1, w.data(), nullptr, nullptr, 0, 0, 0, 64, 2048, FM_F32, 0, 0, 0};
      for (int i = 0; i < 50; ++i) {
        fm_matmul(x.data(), nullptr, nullptr, 1, &m, y.data());
        for (float value : y) error = fmax(error, fabs(value - 1024.0f));
      }
    });
  for (std::thread& caller : callers) caller.join();
  for (double error : errors) good = good && error == 0;
  return good ? 0 : 1;
}
