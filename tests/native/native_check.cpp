// Products in every format against float64, on buffers of the exact size: meant to be compiled with
// sanitizers, or for another machine and run under emulation. Takes the names of instruction sets,
// which must be there; without any, every one that runs here. Prints what it did; exit status 1 on
// an error.

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <thread>
#include <vector>

#include "flashmoe_native.h"
#include "native_check.h"

namespace {

// Of |x| |w|, for one output; and of the norm of the outputs of one pair.
// An expert's outputs go through two products and an activation.
constexpr double kTolerance = 3e-7, kRowTolerance = 2e-6, kExpertTolerance = 4e-6,
                 kAttentionTolerance = 2e-6;

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
  int64_t rows, cols;
  std::vector<int64_t> counts;  // of pairs in a call
};

constexpr int64_t kSlots = 3;

// Random slots of a case, and the values that they stand for.
struct Weights {
  const Case& c;
  const bool floats = c.format <= FM_F16;
  const int64_t values = c.rows * c.cols, groups = floats ? 0 : values / c.group_size;
  const int64_t slot_bytes = floats ? values * bytes_of(c.format) : values * c.bits / 8;
  const int64_t scale_bytes = c.format == FM_MXFP4 ? groups : groups * bytes_of(c.dtype);
  Buffer weight{kSlots * slot_bytes}, scales{kSlots * scale_bytes}, biases{kSlots * scale_bytes};
  std::vector<double> w;

  explicit Weights(const Case& a_case) : c(a_case), w(kSlots * values) {
    if (floats) {
      for (int64_t i = 0; i < kSlots * values; ++i)
        w[i] = put(weight.bytes + i * bytes_of(c.format), c.format);
    }
    for (int64_t g = 0; g < kSlots * groups; ++g) set_group(g);
  }

  fm_matrix matrix() const {
    return {kSlots, weight.bytes, floats ? nullptr : scales.bytes,
            c.format == FM_AFFINE ? biases.bytes : nullptr,
            slot_bytes, scale_bytes, scale_bytes, c.rows, c.cols,
            c.format, c.bits, c.group_size, c.dtype};
  }

  void set_group(int64_t g) {
    static const double e2m1[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6};
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
};

struct Errors {
  double output = 0, row = 0;  // as the tolerances are
  bool same = true;            // a pair has the same bits in any company

  void include(const Errors& other) {
    output = other.output < output ? output : other.output;  // keeps a NaN
    row = other.row < row ? row : other.row;
    same = same && other.same;
  }
  bool good() const { return output < kTolerance && row < kRowTolerance && same; }
};

// One row of x with one slot.
Errors errors_of(const Weights& weights, int64_t slot, const float* x, const float* y) {
  const Case& c = weights.c;
  double xx = 0, matrix = 0, outputs = 0, wrong = 0;
  for (int64_t i = 0; i < c.cols; ++i) xx += double(x[i]) * x[i];
  Errors errors;
  for (int64_t r = 0; r < c.rows; ++r) {
    const double* row = &weights.w[slot * weights.values + r * c.cols];
    double sum = 0, ww = 0;
    for (int64_t i = 0; i < c.cols; ++i) {
      sum += row[i] * x[i];
      ww += row[i] * row[i];
    }
    const double error = y[r] - sum;
    errors.include({fabs(error) / (sqrt(xx * ww) + 1e-30), 0, true});
    matrix += ww;
    outputs += sum * sum;
    wrong += error * error;
  }
  // Few outputs may all cancel to nothing: their scale is that of the products they sum.
  const double norm = c.rows < 8 ? sqrt(xx * matrix) : sqrt(outputs);
  errors.row = sqrt(wrong) / (norm + 1e-30);
  return errors;
}

// Every count of pairs, spread over the slots and on one slot alone.
Errors run(const Case& c) {
  const Weights weights(c);
  const fm_matrix matrix = weights.matrix();
  const int64_t most = *std::max_element(c.counts.begin(), c.counts.end());
  Buffer x(most * c.cols * 4);
  auto* xs = reinterpret_cast<float*>(x.bytes);
  for (int64_t i = 0; i < most * c.cols; ++i) xs[i] = random_float();
  // The first result of each row of x with each slot; empty until there is one.
  std::vector<std::vector<float>> known(most * kSlots);
  Errors errors;
  for (int64_t count : c.counts) {
    for (bool spread : {true, false}) {
      std::vector<int32_t> slots(count), x_rows(count);
      for (int64_t p = 0; p < count; ++p) {
        const int64_t row = x_rows[p] = int32_t(count - 1 - p);
        slots[p] = !spread || row % 8 > 1 ? 1 : row % 8 == 1 ? 2 : 0;
      }
      Buffer y(count * c.rows * 4);
      const auto* ys = reinterpret_cast<const float*>(y.bytes);
      if (fm_matmul(xs, x_rows.data(), slots.data(), count, &matrix,
                    reinterpret_cast<float*>(y.bytes)) != FM_OK)
        return {INFINITY, INFINITY, false};
      for (int64_t p = 0; p < count; ++p, ys += c.rows) {
        std::vector<float>& first = known[x_rows[p] * kSlots + slots[p]];
        if (first.empty()) {
          first.assign(ys, ys + c.rows);
          errors.include(errors_of(weights, slots[p], xs + x_rows[p] * c.cols, ys));
        }
        errors.same = errors.same && memcmp(first.data(), ys, c.rows * 4) == 0;
      }
    }
  }
  return errors;
}

std::vector<int64_t> up_to(int64_t most) {
  std::vector<int64_t> counts;
  for (int64_t n = 1; n <= most; ++n) counts.push_back(n);
  return counts;
}

// Every format at shapes odd and even: fewer rows than a tile, more columns than a block, any
// number of rows of x up to 70, and more than are expanded at once.
std::vector<Case> all_cases() {
  const struct { int64_t rows, cols; std::vector<int64_t> counts; } shapes[] = {
      {1, 128, {1, 4, 70}}, {8, 128, up_to(70)}, {9, 256, up_to(10)},
      {5, 2176, {1, 3, 20}}, {14, 1152, {2, 5, 33}}, {19, 384, {1, 4, 130}}};
  std::vector<Case> cases;
  for (const auto& s : shapes) {
    for (int bits : {2, 3, 4, 5, 6, 8})
      for (int group : {32, 64, 128})
        for (int dtype : {FM_F32, FM_BF16, FM_F16})
          cases.push_back({FM_AFFINE, bits, group, dtype, s.rows, s.cols, s.counts});
    cases.push_back({FM_MXFP4, 4, 32, 0, s.rows, s.cols, s.counts});
    for (int format : {FM_F32, FM_BF16, FM_F16})
      for (int64_t extra : {-127, -3, 0, 1, 5})
        cases.push_back({format, 0, 0, 0, s.rows, s.cols + extra, s.counts});
  }
  return cases;
}

// --- routed experts -----------------------------------------------------------------------------

// A vector for each slot, and the values.
struct Vectors {
  Buffer bytes;
  int dtype;
  std::vector<double> v;

  Vectors(int64_t n, int a_dtype) : bytes(kSlots * n * bytes_of(a_dtype)), dtype(a_dtype) {
    for (int64_t i = 0; i < kSlots * n; ++i)
      v.push_back(put(bytes.bytes + i * bytes_of(dtype), dtype));
  }
  fm_vectors vectors() const { return {bytes.bytes, dtype}; }
};

double sigmoid(double x) { return 1 / (1 + exp(-x)); }

double activated(const fm_activation& a, double g) {
  g = fmin(g, a.gate_max);
  double y = fmax(g, 0) * fmax(g, 0);
  if (a.kind == FM_SIGMOID) y = g * sigmoid(a.alpha * g);
  if (a.kind == FM_GELU_TANH)
    y = 0.5 * g * (1 + tanh(sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
  if (a.kind == FM_SITU) y = a.alpha * tanh(g / a.alpha) * sigmoid(g);
  return fmin(y, a.activated_max);
}

// W x + b of one slot.
std::vector<double> project(const Weights& w, const Vectors& bias, int64_t slot,
                            const std::vector<double>& x) {
  std::vector<double> y(w.c.rows);
  for (int64_t r = 0; r < w.c.rows; ++r) {
    y[r] = bias.v[slot * w.c.rows + r];
    for (int64_t i = 0; i < w.c.cols; ++i)
      y[r] += w.w[slot * w.values + r * w.c.cols + i] * x[i];
  }
  return y;
}

// The largest error of an expert's outputs, as a share of their norm.
double expert_error(const fm_activation& activation, bool gated, const Case& wide, int dtype) {
  const Case back = {wide.format, wide.bits, wide.group_size, wide.dtype, wide.cols, wide.rows, {}};
  const Weights gate(wide), up(wide), down(back);
  const Vectors gate_bias(wide.rows, dtype), up_bias(wide.rows, dtype), down_bias(back.rows, dtype);
  fm_experts experts = {gate.matrix(), up.matrix(), down.matrix(), gate_bias.vectors(),
                        up_bias.vectors(), down_bias.vectors(), activation};
  if (!gated) experts.gate.weight = nullptr;
  double worst = 0;
  for (int64_t tokens : {1, 5, 40}) {
    const int64_t top_k = 3;
    Buffer x(tokens * wide.cols * 4), y(tokens * top_k * back.rows * 4);
    auto* xs = reinterpret_cast<float*>(x.bytes);
    const auto* ys = reinterpret_cast<float*>(y.bytes);
    // Small, so that activations are not all saturated.
    for (int64_t i = 0; i < tokens * wide.cols; ++i) xs[i] = random_float() / 512;
    std::vector<int32_t> slots(tokens * top_k);
    for (int32_t& slot : slots) slot = int32_t(random_bits() >> 16) % int32_t(kSlots);
    if (fm_expert_forward(xs, slots.data(), tokens, top_k, &experts,
                          reinterpret_cast<float*>(y.bytes)) != FM_OK)
      return INFINITY;
    for (int64_t p = 0; p < tokens * top_k; ++p) {
      const float* row = xs + p / top_k * wide.cols;
      const std::vector<double> in(row, row + wide.cols);
      std::vector<double> h = project(up, up_bias, slots[p], in);
      if (gated) {
        const std::vector<double> g = project(gate, gate_bias, slots[p], in);
        for (size_t i = 0; i < h.size(); ++i) {
          double u = fmax(fmin(h[i], activation.up_max), -activation.up_max);
          if (isfinite(activation.up_bound))
            u = activation.up_bound * tanh(u / activation.up_bound);
          h[i] = activated(activation, g[i]) * (u + activation.up_shift);
        }
      } else {
        for (double& value : h) value = activated(activation, value);
      }
      const std::vector<double> expected = project(down, down_bias, slots[p], h);
      double wrong = 0, norm = 0;
      for (int64_t r = 0; r < back.rows; ++r) {
        const double error = ys[p * back.rows + r] - expected[r];
        wrong += error * error;
        norm += expected[r] * expected[r];
      }
      const double error = sqrt(wrong / norm);
      worst = error < worst ? worst : error;
    }
  }
  return worst;
}

// Every activation with and without a gate, over formats; the largest error.
double experts_error() {
  const float none = INFINITY;
  const fm_activation activations[] = {
      {FM_SIGMOID, 1, none, none, none, none, 0},   {FM_SIGMOID, 1.702f, 7, none, 7, none, 1},
      {FM_SIGMOID, 1, none, 0.5f, 0.5f, none, 0},   {FM_GELU_TANH, 1, none, none, none, none, 0},
      {FM_RELU2, 1, none, none, none, none, 0},     {FM_SITU, 2, none, none, none, 3, 0}};
  const Case cases[] = {{FM_AFFINE, 4, 64, FM_BF16, 192, 256, {}},
                        {FM_AFFINE, 3, 32, FM_F16, 32, 96, {}},
                        {FM_MXFP4, 4, 32, 0, 96, 64, {}},
                        {FM_BF16, 0, 0, 0, 37, 51, {}},
                        {FM_F32, 0, 0, 0, 1, 3, {}}};
  double worst = 0;
  for (const fm_activation& activation : activations)
    for (const Case& c : cases)
      for (bool gated : {true, false}) {
        const int dtype = c.format <= FM_F16 ? c.format : FM_F16;
        const double error = expert_error(activation, gated, c, dtype);
        worst = error < worst ? worst : error;
      }
  return worst;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<const char*> isas(argv + 1, argv + argc);
  if (isas.empty()) isas = {"avx512", "avx2", "neon", "portable"};
  const std::vector<Case> cases = all_cases();
  bool good = true;
  for (const char* isa : isas) {
    if (fm_use_isa(isa) != FM_OK) {
      if (argc == 1) continue;
      fprintf(stderr, "%s does not run here\n", isa);
      return 1;
    }
    Errors worst;
    for (size_t i = 0; i < cases.size(); ++i) {
      fm_set_threads(int(i % 4));
      const Errors errors = run(cases[i]);
      if (!errors.good()) {
        const Case& c = cases[i];
        fprintf(stderr, "%s: format %d bits %d group %d dtype %d [%d, %d]: %g %g%s\n", isa,
                c.format, c.bits, c.group_size, c.dtype, int(c.rows), int(c.cols), errors.output,
                errors.row, errors.same ? "" : ", depends on the other pairs");
        good = false;
      }
      worst.include(errors);
    }
    printf("%s %zu cases, worst error %.1e of |x| |w|, %.1e of a row's norm\n", isa, cases.size(),
           worst.output, worst.row);
    const double expert = experts_error();
    printf("%s routed experts, worst error %.1e of a row's norm\n", isa, expert);
    const double attention = attention_error();
    printf("%s attention, worst error %.1e of the largest value\n", isa, attention);
    const bool fits = fits_well();
    printf("%s fitted groups, %s\n", isa, fits ? "as close as they were given" : "too far off");
    good = good && expert < kExpertTolerance && attention < kAttentionTolerance && fits;
  }
  const bool checksums = checksums_are_right();
  printf("checksums, %s\n", checksums ? "right" : "wrong");
  good = good && checksums;
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
