// What the parts of native_check share.
#ifndef FLASHMOE_NATIVE_CHECK_H
#define FLASHMOE_NATIVE_CHECK_H

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

inline uint32_t random_bits() {
  static uint32_t state = 1;
  return state = state * 1664525u + 1013904223u;
}
inline float random_float() { return float(random_bits() >> 8) / 8388608.0f - 1.0f; }

// Random bytes that end where an overrun is noticed: by the address sanitizer, or at a page that
// nobody may touch.
struct Buffer {
  uint8_t* bytes;
#ifdef __SANITIZE_ADDRESS__
  explicit Buffer(int64_t size) : bytes(static_cast<uint8_t*>(malloc(size))) { fill(size); }
  ~Buffer() { free(bytes); }
#else
  explicit Buffer(int64_t size) {
    const int64_t page = sysconf(_SC_PAGESIZE), usable = (size + page - 1) / page * page;
    mapped = usable + page;
    start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    bytes = static_cast<uint8_t*>(start) + (usable - size);
    if (start == MAP_FAILED || mprotect(bytes + size, page, PROT_NONE) != 0) abort();
    fill(size);
  }
  ~Buffer() { munmap(start, mapped); }
  void* start;
  int64_t mapped;
#endif
  Buffer(const Buffer&) = delete;
  void fill(int64_t size) {
    for (int64_t i = 0; i < size; ++i) bytes[i] = uint8_t(random_bits() >> 24);
  }
};

// Attention with every kind of mask against float64: the largest error, as a share of the largest
// value; infinite where a row's bits depend on threads or on the rows beside it.
double attention_error();

// Whether fitted groups are as close as what they were given, for every width, group and dtype.
bool fits_well();

// Whether SHA-256, of one and of two, and CRC-32 are what plain arithmetic gives, or all refused.
bool checksums_are_right();

#endif
