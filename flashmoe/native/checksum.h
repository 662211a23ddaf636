// SHA-256 and CRC-32 in one instruction set.
#pragma once

#include <stdint.h>

namespace flashmoe {

struct Checksums {
  void (*sha256)(uint32_t* state, const uint8_t* data, int64_t n_blocks);
  void (*sha256_of_two)(uint32_t* const states[2], const uint8_t* const data[2], int64_t n_blocks);
  uint32_t (*crc32)(uint32_t crc, const uint8_t* data, int64_t n_bytes);
};

#if defined(__x86_64__)
extern const Checksums kX86Checksums;
#elif defined(__aarch64__)
extern const Checksums kArmChecksums;
#endif

}  // namespace flashmoe
