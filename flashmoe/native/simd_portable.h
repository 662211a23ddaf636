// 4 floats in plain C++ that compilers turn into whatever vectors the base machine has.
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace flashmoe {
namespace {

struct Simd {
  struct Vector {
    float at[4];
  };
  static constexpr const char* kName = "portable";
  static constexpr int kLanes = 4;
  static constexpr Shape kSingle = {4, 1}, kFew = {2, 4}, kMany = {3, 4};
  static constexpr Shape kOuter = {4, 2};  // rows, and vectors of columns

  static Vector load(const float* at) {
    Vector v;
    memcpy(v.at, at, sizeof v.at);
    return v;
  }
  static void store(float* at, Vector v) { memcpy(at, v.at, sizeof v.at); }
  static Vector zero() { return {{0.0f, 0.0f, 0.0f, 0.0f}}; }
  static Vector fill(float x) { return {{x, x, x, x}}; }
  static Vector add(Vector a, Vector b) {
    for (int i = 0; i < 4; ++i) a.at[i] += b.at[i];
    return a;
  }
  static Vector fma(Vector a, Vector b, Vector c) {
    for (int i = 0; i < 4; ++i) c.at[i] += a.at[i] * b.at[i];
    return c;
  }
  static float sum(Vector v) { return (v.at[0] + v.at[2]) + (v.at[1] + v.at[3]); }
  static Vector load_bf16(const uint8_t* at) {
    Vector v;
    for (int i = 0; i < 4; ++i) v.at[i] = float_of(uint32_t(half_at(at + 2 * i)) << 16);
    return v;
  }
  static Vector load_f16(const uint8_t* at) {
    Vector v;
    for (int i = 0; i < 4; ++i) {
      const uint32_t half = half_at(at + 2 * i), sign = (half & 0x8000u) << 16;
      const uint32_t magnitude = (half & 0x7fffu) << 13;
      // The exponent's bias grows by 112, by a multiplication that is right for subnormals too.
      const bool special = magnitude >= 0x0f800000u;
      const float value = special ? float_of(magnitude | 0x7f800000u)
                                  : float_of(magnitude) * float_of(0x77800000u);
      v.at[i] = sign ? -value : value;
    }
    return v;
  }

  // Vector `v` of a block's codes.
  template <int Bits>
  static void codes(const uint8_t* block, int v, int32_t* out) {
    constexpr int block_bytes = 4 * Bits;
    const int bit = 4 * Bits * v, byte = bit / 8;
    const int from = byte + 4 <= block_bytes ? byte : block_bytes - 4;
    uint32_t word;
    memcpy(&word, block + from, sizeof word);
    word >>= bit - 8 * from;
    for (int i = 0; i < 4; ++i) out[i] = int32_t(word >> Bits * i) & ((1 << Bits) - 1);
  }

  // w = scale * q + bias
  template <int Bits>
  struct Affine {
    float scale, bias;
    Affine(const float* s, const float* b) : scale(*s), bias(*b) {}
    Vector at(const uint8_t* block, int v) const {
      int32_t q[4];
      codes<Bits>(block, v, q);
      Vector w;
      for (int i = 0; i < 4; ++i) w.at[i] = scale * float(q[i]) + bias;
      return w;
    }
  };

  struct Mxfp4 {
    float scale;
    explicit Mxfp4(const float* s) : scale(*s) {}
    Vector at(const uint8_t* block, int v) const {
      static constexpr float e2m1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                         -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
      int32_t q[4];
      codes<4>(block, v, q);
      Vector w;
      for (int i = 0; i < 4; ++i) w.at[i] = scale * e2m1[q[i]];
      return w;
    }
  };

 private:
  static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  static uint16_t half_at(const uint8_t* at) {
    uint16_t value;
    memcpy(&value, at, sizeof value);
    return value;
  }
};

}  // namespace
}  // namespace flashmoe
