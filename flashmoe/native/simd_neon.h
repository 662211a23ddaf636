// 4 floats in NEON: every 64-bit ARM.
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace flashmoe {
namespace {

struct Simd {
  using Vector = float32x4_t;
  static constexpr const char* kName = "neon";
  static constexpr int kLanes = 4;
  static constexpr Shape kSingle = {8, 1}, kFew = {4, 4}, kMany = {4, 5};
  static constexpr Shape kOuter = {8, 2};  // rows, and vectors of columns

  static Vector load(const float* at) { return vld1q_f32(at); }
  static void store(float* at, Vector v) { vst1q_f32(at, v); }
  static Vector zero() { return vdupq_n_f32(0.0f); }
  static Vector fill(float x) { return vdupq_n_f32(x); }
  static Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
  static float sum(Vector v) { return vaddvq_f32(v); }
  static Vector load_bf16(const uint8_t* at) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(at)), 16));
  }
  static Vector load_f16(const uint8_t* at) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at)));
  }

  // Vector `v` of a block's codes, one in each lane.
  template <int Bits>
  static uint32x4_t codes(const uint8_t* block, int v) {
    if constexpr (Bits == 8) {
      return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bits_at(block + 4 * v, 4)))));
    } else {
      // Four codes are at most 24 bits; from their first byte on they fit a word.
      constexpr int block_bytes = 4 * Bits;
      const int bit = 4 * Bits * v, byte = bit / 8;
      const int from = byte + 4 <= block_bytes ? byte : block_bytes - 4;
      const uint32_t word = uint32_t(bits_at(block + from, 4)) >> (bit - 8 * from);
      const int32_t right[4] = {0, -Bits, -2 * Bits, -3 * Bits};
      const uint32x4_t shifted = vshlq_u32(vdupq_n_u32(word), vld1q_s32(right));
      return vandq_u32(shifted, vdupq_n_u32((1 << Bits) - 1));
    }
  }

  // w = scale * q + bias
  template <int Bits>
  struct Affine {
    float32x4_t scale, bias;
    Affine(const float* s, const float* b) : scale(vdupq_n_f32(*s)), bias(vdupq_n_f32(*b)) {}
    Vector at(const uint8_t* block, int v) const {
      return vfmaq_f32(bias, scale, vcvtq_f32_u32(codes<Bits>(block, v)));
    }
  };

  // Codes to twice their value by a byte table, the scale halved.
  struct Mxfp4 {
    float32x4_t half_scale;
    explicit Mxfp4(const float* scale) : half_scale(vdupq_n_f32(*scale * 0.5f)) {}
    Vector at(const uint8_t* block, int v) const {
      const int8_t doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
      const int8x16_t bytes =
          vqtbl1q_s8(vld1q_s8(doubled), vreinterpretq_u8_u32(codes<4>(block, v)));
      const int32x4_t q = vshrq_n_s32(vshlq_n_s32(vreinterpretq_s32_s8(bytes), 24), 24);
      return vmulq_f32(half_scale, vcvtq_f32_s32(q));
    }
  };

 private:
  static uint64_t bits_at(const uint8_t* at, int bytes) {
    uint64_t value = 0;
    memcpy(&value, at, bytes);
    return value;
  }
};

}  // namespace
}  // namespace flashmoe
