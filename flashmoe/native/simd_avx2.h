// 8 floats in AVX2 with FMA and F16C: x86 since 2013.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace flashmoe {
namespace {

struct Simd {
  using Vector = __m256;
  static constexpr const char* kName = "avx2";
  static constexpr int kLanes = 8;
  static constexpr Shape kSingle = {4, 1}, kFew = {2, 4}, kMany = {3, 4};
  static constexpr Shape kOuter = {4, 2};  // rows, and vectors of columns

  static Vector load(const float* at) { return _mm256_loadu_ps(at); }
  static void store(float* at, Vector v) { _mm256_storeu_ps(at, v); }
  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector fill(float x) { return _mm256_set1_ps(x); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Vector v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static Vector load_bf16(const uint8_t* at) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static Vector load_f16(const uint8_t* at) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at));
  }

  // Vector `v` of a block's codes, one in the low bits of each lane; above them is what follows.
  template <int Bits>
  static __m256i codes(const uint8_t* block, int v) {
    if constexpr (Bits == 8) {
      return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(block + 8 * v)));
    } else if constexpr (Bits == 2 || Bits == 4) {
      const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const __m256i shifts = _mm256_slli_epi32(lanes, Bits / 2);
      const __m256i words = _mm256_set1_epi32(word(block + Bits * v / 4 * 4));
      const __m256i codes = _mm256_srlv_epi32(words, shifts);
      return Bits == 2 && v % 2 ? _mm256_srli_epi32(codes, 16) : codes;
    } else {
      return spanning_codes<Bits>(block, v);
    }
  }

  // w = scale * q + bias
  template <int Bits>
  struct Affine {
    __m256 scale, bias;
    Affine(const float* s, const float* b) : scale(_mm256_set1_ps(*s)), bias(_mm256_set1_ps(*b)) {}
    Vector at(const uint8_t* block, int v) const {
      const __m256i q = codes<Bits>(block, v);
      const __m256i masked =
          Bits == 8 ? q : _mm256_and_si256(q, _mm256_set1_epi32((1 << Bits) - 1));
      return _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(masked), bias);
    }
  };

  // A table of the eight magnitudes, looked up by the low three bits; the fourth is the sign.
  struct Mxfp4 {
    __m256 table;
    explicit Mxfp4(const float* scale) {
      const __m256 e2m1 = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
      table = _mm256_mul_ps(e2m1, _mm256_set1_ps(*scale));
    }
    Vector at(const uint8_t* block, int v) const {
      const __m256i q = codes<4>(block, v);
      const __m256i sign =
          _mm256_and_si256(_mm256_slli_epi32(q, 28), _mm256_set1_epi32(int(0x80000000u)));
      return _mm256_xor_ps(_mm256_permutevar8x32_ps(table, q), _mm256_castsi256_ps(sign));
    }
  };

 private:
  static int word(const uint8_t* at) {
    int32_t value;
    memcpy(&value, at, sizeof value);
    return value;
  }

  // 3, 5 and 6 bits: a vector is `Bits` bytes, loaded as 8 that lie inside the block.
  template <int Bits>
  static __m256i spanning_codes(const uint8_t* block, int v) {
    const int from = Bits * v + 8 <= 4 * Bits ? Bits * v : 4 * Bits - 8;
    int64_t bytes;
    memcpy(&bytes, block + from, sizeof bytes);
    // Two bytes to each lane, then the shift that is left.
    constexpr int b = Bits;
    const __m256i pick = _mm256_setr_epi8(
        0, 1, -1, -1, b / 8, b / 8 + 1, -1, -1, 2 * b / 8, 2 * b / 8 + 1, -1, -1, 3 * b / 8,
        3 * b / 8 + 1, -1, -1, 4 * b / 8, 4 * b / 8 + 1, -1, -1, 5 * b / 8, 5 * b / 8 + 1, -1, -1,
        6 * b / 8, 6 * b / 8 + 1, -1, -1, 7 * b / 8, 7 * b / 8 + 1, -1, -1);
    const __m256i shifts = _mm256_setr_epi32(0, b % 8, 2 * b % 8, 3 * b % 8, 4 * b % 8, 5 * b % 8,
                                             6 * b % 8, 7 * b % 8);
    const __m256i moved = _mm256_set1_epi64x(int64_t(uint64_t(bytes) >> 8 * (Bits * v - from)));
    return _mm256_srlv_epi32(_mm256_shuffle_epi8(moved, pick), shifts);
  }
};

}  // namespace
}  // namespace flashmoe
