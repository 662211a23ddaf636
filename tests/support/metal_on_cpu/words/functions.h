// MSL's common, math and integer functions. There are none for bfloat, which becomes a float.
#pragma once

#include "vectors.h"

namespace metal {

#define METAL_ON_CPU_VECTOR1(name)                                          \
  template <class T, int N>                                                 \
  inline vec<T, N> name(const vec<T, N>& x) {                               \
    return each<N, T>([&](int i) { return T(name(x[i])); });                \
  }
#define METAL_ON_CPU_FLOAT1(name, expression)                               \
  inline float name(float x) { return expression; }                         \
  inline half name(half x) { return half(name(float(x))); }                 \
  METAL_ON_CPU_VECTOR1(name)
METAL_ON_CPU_FLOAT1(exp, __builtin_expf(x))
METAL_ON_CPU_FLOAT1(exp2, __builtin_exp2f(x))
METAL_ON_CPU_FLOAT1(exp10, __builtin_powf(10.0f, x))
METAL_ON_CPU_FLOAT1(log, __builtin_logf(x))
METAL_ON_CPU_FLOAT1(log2, __builtin_log2f(x))
METAL_ON_CPU_FLOAT1(log10, __builtin_log10f(x))
METAL_ON_CPU_FLOAT1(sqrt, __builtin_sqrtf(x))
METAL_ON_CPU_FLOAT1(rsqrt, 1.0f / __builtin_sqrtf(x))
METAL_ON_CPU_FLOAT1(sin, __builtin_sinf(x))
METAL_ON_CPU_FLOAT1(cos, __builtin_cosf(x))
METAL_ON_CPU_FLOAT1(tan, __builtin_tanf(x))
METAL_ON_CPU_FLOAT1(asin, __builtin_asinf(x))
METAL_ON_CPU_FLOAT1(acos, __builtin_acosf(x))
METAL_ON_CPU_FLOAT1(atan, __builtin_atanf(x))
METAL_ON_CPU_FLOAT1(sinh, __builtin_sinhf(x))
METAL_ON_CPU_FLOAT1(cosh, __builtin_coshf(x))
METAL_ON_CPU_FLOAT1(tanh, __builtin_tanhf(x))
METAL_ON_CPU_FLOAT1(floor, __builtin_floorf(x))
METAL_ON_CPU_FLOAT1(ceil, __builtin_ceilf(x))
METAL_ON_CPU_FLOAT1(trunc, __builtin_truncf(x))
METAL_ON_CPU_FLOAT1(round, __builtin_roundf(x))
METAL_ON_CPU_FLOAT1(rint, __builtin_rintf(x))
METAL_ON_CPU_FLOAT1(fabs, __builtin_fabsf(x))
METAL_ON_CPU_FLOAT1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
METAL_ON_CPU_FLOAT1(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? x : 0.0f)
METAL_ON_CPU_FLOAT1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
#undef METAL_ON_CPU_FLOAT1

#define METAL_ON_CPU_FLOAT2(name, expression)                                    \
  inline float name(float x, float y) { return expression; }                     \
  inline half name(half x, half y) { return half(name(float(x), float(y))); }    \
  template <class T, int N>                                                      \
  inline vec<T, N> name(const vec<T, N>& x, const vec<T, N>& y) {                \
    return each<N, T>([&](int i) { return T(name(x[i], y[i])); });               \
  }
METAL_ON_CPU_FLOAT2(pow, __builtin_powf(x, y))
METAL_ON_CPU_FLOAT2(powr, __builtin_powf(x, y))
METAL_ON_CPU_FLOAT2(fmod, __builtin_fmodf(x, y))
METAL_ON_CPU_FLOAT2(fmin, __builtin_fminf(x, y))
METAL_ON_CPU_FLOAT2(fmax, __builtin_fmaxf(x, y))
METAL_ON_CPU_FLOAT2(atan2, __builtin_atan2f(x, y))
METAL_ON_CPU_FLOAT2(copysign, __builtin_copysignf(x, y))
METAL_ON_CPU_FLOAT2(min, __builtin_fminf(x, y))
METAL_ON_CPU_FLOAT2(max, __builtin_fmaxf(x, y))
#undef METAL_ON_CPU_FLOAT2

#define METAL_ON_CPU_TEST(name, expression)                                 \
  inline bool name(float x) { return expression; }                          \
  inline bool name(half x) { return name(float(x)); }
METAL_ON_CPU_TEST(isnan, __builtin_isnan(x))
METAL_ON_CPU_TEST(isinf, __builtin_isinf(x))
METAL_ON_CPU_TEST(isfinite, __builtin_isfinite(x))
METAL_ON_CPU_TEST(signbit, __builtin_signbit(x) != 0)
#undef METAL_ON_CPU_TEST

inline float abs(float x) { return __builtin_fabsf(x); }
inline half abs(half x) { return half(__builtin_fabsf(float(x))); }
METAL_ON_CPU_VECTOR1(abs)
#undef METAL_ON_CPU_VECTOR1

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) {
  return half(float(double(float(a)) * float(b) + float(c)));
}
template <class T, int N>
inline vec<T, N> fma(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& c) {
  return each<N, T>([&](int i) { return fma(a[i], b[i], c[i]); });
}
inline float clamp(float x, float low, float high) {
  return __builtin_fminf(__builtin_fmaxf(x, low), high);
}
inline half clamp(half x, half low, half high) { return min(max(x, low), high); }
inline float mix(float x, float y, float a) { return x + (y - x) * a; }
inline half mix(half x, half y, half a) { return x + (y - x) * a; }
inline float step(float edge, float x) { return x < edge ? 0.0f : 1.0f; }
inline float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
inline half ldexp(half x, int k) { return half(__builtin_ldexpf(float(x), k)); }

template <class T>
using if_integer = std::enable_if_t<std::is_integral<T>::value, int>;
template <class T, if_integer<T> = 0>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T, if_integer<T> = 0>
inline T max(T a, T b) {
  return a < b ? b : a;
}
template <class T, if_integer<T> = 0>
inline T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <class T, if_integer<T> = 0>
inline std::make_unsigned_t<T> abs(T x) {
  return x < 0 ? std::make_unsigned_t<T>(0) - std::make_unsigned_t<T>(x) : x;
}
template <class T, if_integer<T> = 0>
inline T popcount(T x) {
  return T(__builtin_popcountll(std::make_unsigned_t<T>(x)));
}
template <class T, if_integer<T> = 0>
inline T clz(T x) {
  std::make_unsigned_t<T> bits(x);
  return T(bits ? __builtin_clzll(bits) - (64 - 8 * int(sizeof(T))) : 8 * int(sizeof(T)));
}
template <class T, if_integer<T> = 0>
inline T ctz(T x) {
  std::make_unsigned_t<T> bits(x);
  return T(bits ? __builtin_ctzll(bits) : 8 * int(sizeof(T)));
}
inline uint mulhi(uint a, uint b) { return uint((uint64_t(a) * b) >> 32); }
inline uint extract_bits(uint x, uint offset, uint bits) {
  return bits == 0 ? 0 : (x >> offset) & (0xffffffffu >> (32 - bits));
}

template <class T>
inline T select(T no, T yes, bool which) {
  return which ? yes : no;
}
template <class T, int N>
inline vec<T, N> select(const vec<T, N>& no, const vec<T, N>& yes, const vec<bool, N>& which) {
  return each<N, T>([&](int i) { return which[i] ? yes[i] : no[i]; });
}

#define METAL_ON_CPU_PRECISE(name) using metal::name;
#define METAL_ON_CPU_BOTH(words)                                                              \
  words(exp) words(exp2) words(exp10) words(log) words(log2) words(log10) words(sqrt)         \
  words(rsqrt) words(sin) words(cos) words(tan) words(asin) words(acos) words(atan)           \
  words(sinh) words(cosh) words(tanh) words(floor) words(ceil) words(trunc) words(round)      \
  words(rint) words(fabs) words(fract) words(sign) words(saturate) words(pow) words(powr)     \
  words(fmod) words(fmin) words(fmax) words(min) words(max) words(atan2) words(clamp)
namespace precise {
METAL_ON_CPU_BOTH(METAL_ON_CPU_PRECISE)
}
namespace fast {
METAL_ON_CPU_BOTH(METAL_ON_CPU_PRECISE)
}
#undef METAL_ON_CPU_BOTH
#undef METAL_ON_CPU_PRECISE

}  // namespace metal
