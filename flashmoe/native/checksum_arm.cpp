// The cryptography and CRC instructions of ARMv8, asked for here because compilers do not agree on
// a flag for them.
#if !defined(__clang__)
#pragma GCC target("+crypto+crc")
#endif
#include <arm_acle.h>
#include <arm_neon.h>
#include <string.h>

#include "checksum.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("sha2,crc"))), apply_to = function)
#endif
#include "sha256.inl"

namespace flashmoe {
namespace {

struct ArmSha {
  using Words = uint32x4_t;

  static Words load(const uint32_t* words) { return vld1q_u32(words); }
  static Words load_big_endian(const uint8_t* bytes) {
    return vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(bytes)));
  }
  static Words add(Words a, Words b) { return vaddq_u32(a, b); }

  static void begin(const uint32_t* state, Words* halves) {
    halves[0] = vld1q_u32(state);
    halves[1] = vld1q_u32(state + 4);
  }
  static void end(const Words* halves, uint32_t* state) {
    vst1q_u32(state, halves[0]);
    vst1q_u32(state + 4, halves[1]);
  }

  static void four_rounds(Words* halves, Words words) {
    const Words abcd = halves[0];
    halves[0] = vsha256hq_u32(abcd, halves[1], words);
    halves[1] = vsha256h2q_u32(halves[1], abcd, words);
  }
  static Words following(Words w0, Words w1, Words w2, Words w3) {
    return vsha256su1q_u32(vsha256su0q_u32(w0, w1), w2, w3);
  }
};

uint32_t crc32(uint32_t crc, const uint8_t* data, int64_t n_bytes) {
  crc = ~crc;
  for (; n_bytes >= 8; data += 8, n_bytes -= 8) {
    uint64_t word;
    memcpy(&word, data, 8);
    crc = __crc32d(crc, word);
  }
  for (; n_bytes > 0; ++data, --n_bytes) crc = __crc32b(crc, *data);
  return ~crc;
}

}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#endif

const Checksums kArmChecksums = {sha256<ArmSha>, sha256_of_two<ArmSha>, crc32};

}  // namespace flashmoe
