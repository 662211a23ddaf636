// fm_sha256 and fm_crc32, where this processor has instructions for them.
#include "checksum.h"

#include "flashmoe_checksum.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace flashmoe {
namespace {

const Checksums* find() {
#if defined(__x86_64__)
  // By number, because not every compiler's cpuid.h names all of these.
  constexpr unsigned kPclmul = 1u << 1, kSsse3 = 1u << 9, kSse41 = 1u << 19, kSha = 1u << 29;
  constexpr unsigned kFirst = kPclmul | kSsse3 | kSse41;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kFirst) != kFirst) return nullptr;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & kSha)) return nullptr;
  return &kX86Checksums;
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kSha2 = 1ul << 6, kCrc32 = 1ul << 7;
  constexpr unsigned long kBoth = kSha2 | kCrc32;
  return (getauxval(AT_HWCAP) & kBoth) == kBoth ? &kArmChecksums : nullptr;
#elif defined(__aarch64__) && defined(__APPLE__)
  return &kArmChecksums;  // every one of them
#else
  return nullptr;
#endif
}

const Checksums* checksums() {
  static const Checksums* const found = find();
  return found;
}

}  // namespace
}  // namespace flashmoe

int fm_sha256(uint32_t* state, const uint8_t* data, uint32_t* other, const uint8_t* other_data,
              int64_t n_blocks) {
  if (!state || !data || n_blocks < 0 || (other && !other_data)) return FM_BAD_ARGUMENT;
  const auto* own = flashmoe::checksums();
  if (!own) return FM_UNSUPPORTED;
  uint32_t* const states[] = {state, other};
  const uint8_t* const both[] = {data, other_data};
  if (other)
    own->sha256_of_two(states, both, n_blocks);
  else
    own->sha256(state, data, n_blocks);
  return FM_OK;
}

int fm_crc32(const uint8_t* data, int64_t n_bytes, uint32_t* crc) {
  if (!crc || n_bytes < 0 || (n_bytes && !data)) return FM_BAD_ARGUMENT;
  const auto* own = flashmoe::checksums();
  if (!own) return FM_UNSUPPORTED;
  *crc = own->crc32(*crc, data, n_bytes);
  return FM_OK;
}
