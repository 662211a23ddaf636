// The SHA-256 and CRC-32 instructions against the same in plain arithmetic, written from the
// standards (FIPS 180-4; CRC-32 with the polynomial 0x04c11db7, reflected).
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "flashmoe_checksum.h"
#include "native_check.h"

namespace {

uint32_t turned(uint32_t x, int by) { return x >> by | x << (32 - by); }

// The first 32 bits of the fractional part of a prime's cube root.
uint32_t constant(int prime) {
  const long double root = cbrtl(static_cast<long double>(prime));
  return static_cast<uint32_t>((root - floorl(root)) * 4294967296.0L);
}

std::vector<uint32_t> constants() {
  std::vector<uint32_t> all;
  for (int n = 2; all.size() < 64; ++n) {
    bool prime = true;
    for (int i = 2; i * i <= n; ++i) prime = prime && n % i;
    if (prime) all.push_back(constant(n));
  }
  return all;
}

void take_in(uint32_t* state, const uint8_t* block) {
  static const std::vector<uint32_t> k = constants();
  uint32_t w[64], s[8];
  for (int i = 0; i < 16; ++i)
    w[i] = uint32_t(block[4 * i]) << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 |
           block[4 * i + 3];
  for (int i = 16; i < 64; ++i) {
    const uint32_t a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + (turned(a, 7) ^ turned(a, 18) ^ a >> 3) + w[i - 7] +
           (turned(b, 17) ^ turned(b, 19) ^ b >> 10);
  }
  memcpy(s, state, sizeof s);
  for (int i = 0; i < 64; ++i) {
    const uint32_t e = s[4], a = s[0];
    const uint32_t t1 = s[7] + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) +
                        ((e & s[5]) ^ (~e & s[6])) + k[i] + w[i];
    const uint32_t t2 = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) +
                        ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
    memmove(s + 1, s, 7 * sizeof *s);
    s[4] += t1;
    s[0] = t1 + t2;
  }
  for (int i = 0; i < 8; ++i) state[i] += s[i];
}

uint32_t crc_of(uint32_t crc, const uint8_t* data, int64_t n_bytes) {
  crc = ~crc;
  for (int64_t i = 0; i < n_bytes; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0u);
  }
  return ~crc;
}

}  // namespace

bool checksums_are_right() {
  constexpr int64_t kBytes = 5003;
  const Buffer buffer(kBytes);
  const uint8_t* const data = buffer.bytes;
  uint32_t first[8], second[8];
  if (fm_sha256(first, data, nullptr, nullptr, 0) == FM_UNSUPPORTED) {
    uint32_t crc = 0;
    printf("no instructions for checksums\n");
    return fm_crc32(data, kBytes, &crc) == FM_UNSUPPORTED;
  }
  for (const int64_t n_blocks : {0, 1, 2, 3, 38}) {
    for (int i = 0; i < 8; ++i) first[i] = random_bits(), second[i] = random_bits();
    uint32_t alone[8], plain[8], other[8];
    memcpy(alone, first, sizeof first);
    memcpy(plain, first, sizeof first);
    memcpy(other, second, sizeof second);
    for (int64_t block = 0; block < n_blocks; ++block) {
      take_in(plain, data + 1 + 64 * block);
      take_in(other, data + 2500 + 64 * block);
    }
    if (fm_sha256(alone, data + 1, nullptr, nullptr, n_blocks)) return false;
    if (fm_sha256(first, data + 1, second, data + 2500, n_blocks)) return false;
    if (memcmp(alone, plain, sizeof plain) || memcmp(first, plain, sizeof plain) ||
        memcmp(second, other, sizeof other))
      return false;
  }
  for (int64_t n_bytes = 0; n_bytes <= kBytes; n_bytes += n_bytes < 200 ? 1 : 1601) {
    const int64_t begin = kBytes - n_bytes;
    const uint32_t before = random_bits();
    uint32_t crc = before;
    if (fm_crc32(data + begin, n_bytes, &crc)) return false;
    if (crc != crc_of(before, data + begin, n_bytes)) return false;
  }
  uint32_t crc = 0;
  return fm_crc32(nullptr, 1, &crc) == FM_BAD_ARGUMENT &&
         fm_sha256(first, data, second, nullptr, 1) == FM_BAD_ARGUMENT &&
         fm_sha256(nullptr, data, nullptr, nullptr, 1) == FM_BAD_ARGUMENT;
}
