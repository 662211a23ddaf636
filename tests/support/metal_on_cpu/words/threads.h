// MSL's words between threads: barriers, SIMD-group functions and variables of a threadgroup.
#pragma once

#include "../runner/interface.h"
#include "functions.h"

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

// Always inlined: where the runner is called from tells two calls in the source apart.
#define METAL_ON_CPU_CALL inline __attribute__((always_inline))
#define METAL_ON_CPU_LINE int line = __builtin_LINE()

METAL_ON_CPU_CALL void threadgroup_barrier(mem_flags flags, METAL_ON_CPU_LINE) {
  metal_on_cpu_threadgroup_barrier(int(flags), line);
}
METAL_ON_CPU_CALL void simdgroup_barrier(mem_flags flags, METAL_ON_CPU_LINE) {
  metal_on_cpu_simdgroup_barrier(int(flags), line);
}

template <class T>
struct Lanes {
  T value[32];
  int count;
};
template <class T>
METAL_ON_CPU_CALL Lanes<T> gather(const char* operation, T mine, int line) {
  Lanes<T> lanes;
  lanes.count = metal_on_cpu_gather(operation, line, &mine, sizeof(T), lanes.value);
  return lanes;
}
template <class T>
METAL_ON_CPU_CALL T from_lane(const char* operation, T mine, int lane, int line) {
  T result;
  metal_on_cpu_shuffle(operation, line, &mine, sizeof(T), lane, &result);
  return result;
}
template <class T, class F>
inline T fold(Lanes<T> lanes, F combine) {
  for (int distance = 1; distance < lanes.count; distance *= 2)
    for (int i = 0; i + distance < lanes.count; i += 2 * distance)
      lanes.value[i] = combine(lanes.value[i], lanes.value[i + distance]);
  return lanes.value[0];
}

#define METAL_ON_CPU_FOLD(name, expression)                                        \
  template <class T>                                                               \
  METAL_ON_CPU_CALL T name(T x, METAL_ON_CPU_LINE) {                               \
    return fold(gather(#name, x, line), [](T a, T b) { return T(expression); });   \
  }                                                                                \
  METAL_ON_CPU_CALL float name(bfloat x, METAL_ON_CPU_LINE) { return name(float(x), line); }
METAL_ON_CPU_FOLD(simd_sum, a + b)
METAL_ON_CPU_FOLD(simd_product, a* b)
METAL_ON_CPU_FOLD(simd_max, max(a, b))
METAL_ON_CPU_FOLD(simd_min, min(a, b))
#undef METAL_ON_CPU_FOLD
#define METAL_ON_CPU_FOLD(name, expression)                                        \
  template <class T, if_integer<T> = 0>                                            \
  METAL_ON_CPU_CALL T name(T x, METAL_ON_CPU_LINE) {                               \
    return fold(gather(#name, x, line), [](T a, T b) { return T(expression); });   \
  }
METAL_ON_CPU_FOLD(simd_and, a& b)
METAL_ON_CPU_FOLD(simd_or, a | b)
METAL_ON_CPU_FOLD(simd_xor, a ^ b)
#undef METAL_ON_CPU_FOLD
METAL_ON_CPU_CALL bool simd_all(bool x, METAL_ON_CPU_LINE) {
  return fold(gather("simd_all", x, line), [](bool a, bool b) { return a && b; });
}
METAL_ON_CPU_CALL bool simd_any(bool x, METAL_ON_CPU_LINE) {
  return fold(gather("simd_any", x, line), [](bool a, bool b) { return a || b; });
}

template <class T>
METAL_ON_CPU_CALL T simd_shuffle(T x, ushort lane, METAL_ON_CPU_LINE) {
  return from_lane("simd_shuffle", x, lane, line);
}
template <class T>
METAL_ON_CPU_CALL T simd_broadcast(T x, ushort lane, METAL_ON_CPU_LINE) {
  return from_lane("simd_broadcast", x, lane, line);
}
template <class T>
METAL_ON_CPU_CALL T simd_broadcast_first(T x, METAL_ON_CPU_LINE) {
  return from_lane("simd_broadcast_first", x, 0, line);
}
template <class T>
METAL_ON_CPU_CALL T simd_shuffle_xor(T x, ushort mask, METAL_ON_CPU_LINE) {
  return from_lane("simd_shuffle_xor", x, metal_on_cpu_lane() ^ mask, line);
}
// The lanes whose source would lie outside the SIMD group keep their own value.
template <class T>
METAL_ON_CPU_CALL T simd_shuffle_down(T x, ushort delta, METAL_ON_CPU_LINE) {
  int from = metal_on_cpu_lane() + delta;
  return from_lane("simd_shuffle_down", x, from < 32 ? from : metal_on_cpu_lane(), line);
}
template <class T>
METAL_ON_CPU_CALL T simd_shuffle_up(T x, ushort delta, METAL_ON_CPU_LINE) {
  int from = metal_on_cpu_lane() - delta;
  return from_lane("simd_shuffle_up", x, from >= 0 ? from : metal_on_cpu_lane(), line);
}
template <class T>
METAL_ON_CPU_CALL T simd_prefix_inclusive_sum(T x, METAL_ON_CPU_LINE) {
  Lanes<T> lanes = gather("simd_prefix_inclusive_sum", x, line);
  T sum = lanes.value[0];
  for (int i = 1; i <= metal_on_cpu_lane(); ++i) sum = sum + lanes.value[i];
  return sum;
}
#undef METAL_ON_CPU_LINE
#undef METAL_ON_CPU_CALL

}  // namespace metal

namespace metal_on_cpu {

// The one variable that all threads of the threadgroup share for this declaration.
template <class T>
inline T& threadgroup_variable(const char* name) {
  return *static_cast<T*>(metal_on_cpu_threadgroup_variable(name, sizeof(T), alignof(T)));
}

inline metal::uint3 position(const Position& p) { return metal::uint3(p.x, p.y, p.z); }
inline uint position(uint p) { return p; }

}  // namespace metal_on_cpu
