// The SHA extensions, and CRC-32 by multiplying without carries (Gopal and others, Fast CRC
// Computation for Generic Polynomials Using PCLMULQDQ, Intel 2009: its constants and steps).
#include <immintrin.h>

#include "checksum.h"
#include "sha256.inl"

namespace flashmoe {
namespace {

struct ShaNi {
  using Words = __m128i;

  static Words load(const uint32_t* words) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(words));
  }
  static Words load_big_endian(const uint8_t* bytes) {
    const __m128i order = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)), order);
  }
  static Words add(Words a, Words b) { return _mm_add_epi32(a, b); }

  // The instructions want abef and cdgh, from the highest word down.
  static void begin(const uint32_t* state, Words* halves) {
    const auto* whole = reinterpret_cast<const __m128i*>(state);
    const Words badc = _mm_shuffle_epi32(_mm_loadu_si128(whole), 0xb1);
    const Words hgfe = _mm_shuffle_epi32(_mm_loadu_si128(whole + 1), 0x1b);
    halves[0] = _mm_alignr_epi8(badc, hgfe, 8);
    halves[1] = _mm_blend_epi16(hgfe, badc, 0xf0);
  }
  static void end(const Words* halves, uint32_t* state) {
    auto* whole = reinterpret_cast<__m128i*>(state);
    const Words feba = _mm_shuffle_epi32(halves[0], 0x1b);
    const Words dchg = _mm_shuffle_epi32(halves[1], 0xb1);
    _mm_storeu_si128(whole, _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128(whole + 1, _mm_alignr_epi8(dchg, feba, 8));
  }

  static void four_rounds(Words* halves, Words words) {
    halves[1] = _mm_sha256rnds2_epu32(halves[1], halves[0], words);
    halves[0] = _mm_sha256rnds2_epu32(halves[0], halves[1], _mm_shuffle_epi32(words, 0x0e));
  }
  static Words following(Words w0, Words w1, Words w2, Words w3) {
    const Words sum = _mm_add_epi32(_mm_sha256msg1_epu32(w0, w1), _mm_alignr_epi8(w3, w2, 4));
    return _mm_sha256msg2_epu32(sum, w3);
  }
};

__m128i fold(__m128i sum, __m128i factors, __m128i data) {
  const __m128i low = _mm_clmulepi64_si128(sum, factors, 0x00);
  const __m128i high = _mm_clmulepi64_si128(sum, factors, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), data);
}

__m128i load(const uint8_t* data) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

uint32_t crc32_by_bits(uint32_t crc, const uint8_t* data, int64_t n_bytes) {
  for (int64_t i = 0; i < n_bytes; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return crc;
}

uint32_t crc32(uint32_t crc, const uint8_t* data, int64_t n_bytes) {
  crc = ~crc;
  if (n_bytes < 64) return ~crc32_by_bits(crc, data, n_bytes);
  __m128i sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = load(data + 16 * i);
  sums[0] = _mm_xor_si128(sums[0], _mm_cvtsi32_si128(static_cast<int>(crc)));
  data += 64, n_bytes -= 64;
  const __m128i by_four = _mm_set_epi64x(0x1c6e41596, 0x154442bd4);
  for (; n_bytes >= 64; data += 64, n_bytes -= 64)
    for (int i = 0; i < 4; ++i) sums[i] = fold(sums[i], by_four, load(data + 16 * i));
  const __m128i by_one = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
  __m128i sum = sums[0];
  for (int i = 1; i < 4; ++i) sum = fold(sum, by_one, sums[i]);
  for (; n_bytes >= 16; data += 16, n_bytes -= 16) sum = fold(sum, by_one, load(data));

  // 128 bits to 64, and these to 32 (Barrett).
  const __m128i low = _mm_setr_epi32(-1, 0, -1, 0);
  sum = _mm_xor_si128(_mm_srli_si128(sum, 8), _mm_clmulepi64_si128(sum, by_one, 0x10));
  const __m128i last = _mm_clmulepi64_si128(_mm_and_si128(sum, low),
                                            _mm_set_epi64x(0, 0x163cd6124), 0x00);
  sum = _mm_xor_si128(_mm_srli_si128(sum, 4), last);
  const __m128i barrett = _mm_set_epi64x(0x1f7011641, 0x1db710641);
  __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(sum, low), barrett, 0x10);
  quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low), barrett, 0x00);
  crc = static_cast<uint32_t>(_mm_extract_epi32(_mm_xor_si128(sum, quotient), 1));
  return ~crc32_by_bits(crc, data, n_bytes);
}

}  // namespace

const Checksums kX86Checksums = {sha256<ShaNi>, sha256_of_two<ShaNi>, crc32};

}  // namespace flashmoe
