// 16 floats in AVX-512 (F, BW, VL, DQ): all of Intel's server cores since 2017 and AMD's Zen 4.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own immintrin.h
#endif
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace flashmoe {
namespace {

struct Simd {
  using Vector = __m512;
  static constexpr const char* kName = "avx512";
  static constexpr int kLanes = 16;
  static constexpr Shape kSingle = {4, 1}, kFew = {4, 4}, kMany = {4, 6};
  static constexpr Shape kOuter = {8, 2};  // rows, and vectors of columns

  static Vector load(const float* at) { return _mm512_loadu_ps(at); }
  static void store(float* at, Vector v) { _mm512_storeu_ps(at, v); }
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector fill(float x) { return _mm512_set1_ps(x); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Vector v) { return _mm512_reduce_add_ps(v); }
  static Vector load_bf16(const uint8_t* at) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static Vector load_f16(const uint8_t* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at));
  }

  // Vector `v` of a block's codes, one in the low bits of each lane; above them is what follows.
  template <int Bits>
  static __m512i codes(const uint8_t* block, int v) {
    if constexpr (Bits == 2) {
      const __m512i shifts =
          _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      return _mm512_srlv_epi32(_mm512_set1_epi32(word(block + 4 * v)), shifts);
    } else if constexpr (Bits == 4) {
      const __m512i shifts =
          _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
      const __m512i words =
          _mm512_mask_broadcastd_epi32(_mm512_set1_epi32(word(block + 8 * v)), 0xff00,
                                       _mm_cvtsi32_si128(word(block + 8 * v + 4)));
      return _mm512_srlv_epi32(words, shifts);
    } else if constexpr (Bits == 8) {
      return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(block + 16 * v)));
    } else {
      return spanning_codes<Bits>(block, v);
    }
  }

  // w = scale * q + bias: up to 4 bits a table of all values, above that computed.
  template <int Bits>
  struct Affine {
    __m512 a, b;
    Affine(const float* scale, const float* bias) {
      a = _mm512_set1_ps(*scale);
      b = _mm512_set1_ps(*bias);
      if constexpr (Bits <= 4) {
        constexpr int m = (1 << Bits) - 1;
        const __m512 q = _mm512_setr_ps(0, 1, 2, 3 & m, 4 & m, 5 & m, 6 & m, 7 & m, 8 & m, 9 & m,
                                        10 & m, 11 & m, 12 & m, 13 & m, 14 & m, 15 & m);
        a = _mm512_fmadd_ps(a, q, b);
      }
    }
    Vector at(const uint8_t* block, int v) const {
      const __m512i q = codes<Bits>(block, v);
      if constexpr (Bits <= 4) return _mm512_permutexvar_ps(q, a);
      constexpr bool clean = Bits == 8;
      const __m512i masked = clean ? q : _mm512_and_si512(q, _mm512_set1_epi32((1 << Bits) - 1));
      return _mm512_fmadd_ps(a, _mm512_cvtepi32_ps(masked), b);
    }
  };

  struct Mxfp4 {
    __m512 table;
    explicit Mxfp4(const float* scale) {
      const __m512 e2m1 = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f,
                                         -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
      table = _mm512_mul_ps(e2m1, _mm512_set1_ps(*scale));
    }
    Vector at(const uint8_t* block, int v) const {
      return _mm512_permutexvar_ps(codes<4>(block, v), table);
    }
  };

 private:
  static int word(const uint8_t* at) {
    int32_t value;
    memcpy(&value, at, sizeof value);
    return value;
  }

  // 3, 5 and 6 bits: the vector's bytes in every 128-bit part, two of them brought to each lane.
  template <int Bits>
  static __m512i spanning_codes(const uint8_t* block, int v) {
    constexpr int loaded = Bits == 3 ? 8 : 16, block_bytes = 4 * Bits;
    const int first = 2 * Bits * v;
    const int from = first + loaded <= block_bytes ? first : block_bytes - loaded;
    __m512i bytes;
    if constexpr (loaded == 8) {
      bytes = _mm512_broadcastq_epi64(_mm_loadl_epi64((const __m128i*)(block + from)));
    } else {
      bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(block + from)));
    }
    alignas(64) static constexpr Spread<Bits> spreads[2] = {Spread<Bits>(0),
                                                            Spread<Bits>(4 * Bits - loaded)};
    const Spread<Bits>& spread = spreads[v];
    const __m512i pairs = _mm512_shuffle_epi8(bytes, _mm512_load_si512(spread.bytes));
    return _mm512_srlv_epi32(pairs, _mm512_load_si512(spread.shifts));
  }

  // Where each lane's code lies: two byte numbers (0x80 gives zero) and a shift.
  template <int Bits>
  struct Spread {
    alignas(64) uint8_t bytes[64];
    alignas(64) int32_t shifts[16];
    // `from`: where in the block the load of this vector began.
    constexpr explicit Spread(int from) : bytes(), shifts() {
      const int skipped = from ? 2 * Bits - from : 0;
      for (int lane = 0; lane < 16; ++lane) {
        const int byte = skipped + Bits * lane / 8;
        bytes[4 * lane] = uint8_t(byte);
        bytes[4 * lane + 1] = uint8_t(byte + 1 < skipped + 2 * Bits ? byte + 1 : 0x80);
        bytes[4 * lane + 2] = bytes[4 * lane + 3] = 0x80;
        shifts[lane] = Bits * lane % 8;
      }
    }
  };
};

}  // namespace
}  // namespace flashmoe
