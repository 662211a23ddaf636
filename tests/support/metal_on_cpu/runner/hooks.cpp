// The calls that compilers put around every access for -fsanitize=thread, and at the checks of
// -fsanitize=alignment and the like. No sanitizer's own library is linked: these are the library.
#include <cstdint>
#include <string>

#include "fault.h"
#include "lockstep.h"
#include "memory.h"

using namespace metal_on_cpu;

namespace {

inline void touch(const void* address, size_t bytes, bool write, const void* pc) {
  if (running == nullptr || on_stack(address)) return;
  memory.touch(address, bytes, write, actor(), pc);
}

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

// The checks' descriptions all begin with where in the source they stand.
[[noreturn]] void refuse(const char* kind, const std::string& text, const void* description) {
  fault(kind, text, int(static_cast<const SourceLocation*>(description)->line), nullptr);
}

struct TypeMismatch {
  SourceLocation location;
  const void* type;
  unsigned char log_alignment;
};

[[noreturn]] void refuse_address(const void* description, uintptr_t address) {
  unsigned alignment = 1u << static_cast<const TypeMismatch*>(description)->log_alignment;
  refuse("misaligned access", "the address is " + std::to_string(address % alignment) +
         " bytes past a multiple of " + std::to_string(alignment), description);
}

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(const void* caller) {
  if (running) enter_function(caller);
}
void __tsan_func_exit() {
  if (running) leave_function();
}

#define ACCESS(name, bytes, write) \
  void name(const void* address) { touch(address, bytes, write, __builtin_return_address(0)); }
#define ACCESSES(bytes)                                   \
  ACCESS(__tsan_read##bytes, bytes, false)                \
  ACCESS(__tsan_write##bytes, bytes, true)                \
  ACCESS(__tsan_volatile_read##bytes, bytes, false)       \
  ACCESS(__tsan_volatile_write##bytes, bytes, true)       \
  ACCESS(__tsan_unaligned_read##bytes, bytes, false)      \
  ACCESS(__tsan_unaligned_write##bytes, bytes, true)      \
  ACCESS(__tsan_unaligned_volatile_read##bytes, bytes, false) \
  ACCESS(__tsan_unaligned_volatile_write##bytes, bytes, true)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

void __tsan_read_range(const void* address, size_t bytes) {
  touch(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(const void* address, size_t bytes) {
  touch(address, bytes, true, __builtin_return_address(0));
}
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  touch(from, bytes, false, __builtin_return_address(0));
  touch(to, bytes, true, __builtin_return_address(0));
  return __builtin_memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  touch(from, bytes, false, __builtin_return_address(0));
  touch(to, bytes, true, __builtin_return_address(0));
  return __builtin_memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  touch(to, bytes, true, __builtin_return_address(0));
  return __builtin_memset(to, value, bytes);
}

#define REFUSALS(name, kind, text)                                                        \
  void __ubsan_handle_##name(void* description, uintptr_t) { refuse(kind, text, description); } \
  void __ubsan_handle_##name##_abort(void* description, uintptr_t) {                      \
    refuse(kind, text, description);                                                      \
  }
REFUSALS(out_of_bounds, "out of bounds", "an array's index is outside the array")
REFUSALS(shift_out_of_bounds, "shift", "shifts by as many bits as the number has, or more")
REFUSALS(divrem_overflow, "division", "divides an integer by zero")
void __ubsan_handle_type_mismatch_v1(void* description, uintptr_t address) {
  refuse_address(description, address);
}
void __ubsan_handle_type_mismatch_v1_abort(void* description, uintptr_t address) {
  refuse_address(description, address);
}
}
