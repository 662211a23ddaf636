// MSL's scalar types: half and bfloat round to nearest even at every operation, as a GPU does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

namespace metal {

template <class T, class S>
inline T as_type(const S& value) {
  static_assert(sizeof(T) == sizeof(S), "as_type needs two types of one size");
  T result;
  __builtin_memcpy(&result, &value, sizeof(T));
  return result;
}

namespace narrow {

constexpr float half_to_float(uint16_t bits) {
  uint32_t sign = uint32_t(bits & 0x8000) << 16;
  uint32_t exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent == 31) return __builtin_bit_cast(float, sign | 0x7f800000u | (fraction << 13));
  if (exponent == 0) {
    float value = float(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  return __builtin_bit_cast(float, sign | ((exponent + 112) << 23) | (fraction << 13));
}

constexpr uint16_t float_to_half(float value) {
  uint32_t bits = __builtin_bit_cast(uint32_t, value);
  uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;
  if (magnitude < 0x38800000u) {
    // Below the smallest normal: adding 0.5 leaves the multiple of 2^-24 in the low bits.
    float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    return sign | uint16_t(__builtin_bit_cast(uint32_t, shifted) - 0x3f000000u);
  }
  uint32_t even = (magnitude >> 13) & 1;
  return sign | uint16_t((magnitude - 0x38000000u + 0xfffu + even) >> 13);
}

constexpr float bfloat_to_float(uint16_t bits) {
  return __builtin_bit_cast(float, uint32_t(bits) << 16);
}

constexpr uint16_t float_to_bfloat(float value) {
  uint32_t bits = __builtin_bit_cast(uint32_t, value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

template <class T>
using if_arithmetic = std::enable_if_t<std::is_arithmetic<T>::value, int>;
template <class T>
using if_integral = std::enable_if_t<std::is_integral<T>::value, int>;
template <class T>
using if_floating = std::enable_if_t<std::is_floating_point<T>::value, int>;

}  // namespace narrow
}  // namespace metal

struct half {
  uint16_t bits;
  half() = default;
  template <class T, metal::narrow::if_arithmetic<T> = 0>
  constexpr half(T value) : bits(metal::narrow::float_to_half(float(value))) {}
  constexpr operator float() const { return metal::narrow::half_to_float(bits); }
};

// A float becomes a bfloat only where the source says so; a bfloat becomes a float by itself.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  template <class T, metal::narrow::if_arithmetic<T> = 0>
  constexpr explicit bfloat(T value) : bits(metal::narrow::float_to_bfloat(float(value))) {}
  constexpr explicit bfloat(half value) : bits(metal::narrow::float_to_bfloat(float(value))) {}
  constexpr operator float() const { return metal::narrow::bfloat_to_float(bits); }
};

#define METAL_ON_CPU_OPERATION(S, op)                                      \
  constexpr S operator op(S a, S b) { return S(float(a) op float(b)); }    \
  template <class T, metal::narrow::if_integral<T> = 0>                    \
  constexpr S operator op(S a, T b) {                                      \
    return a op S(b);                                                      \
  }                                                                        \
  template <class T, metal::narrow::if_integral<T> = 0>                    \
  constexpr S operator op(T a, S b) {                                      \
    return S(a) op b;                                                      \
  }                                                                        \
  template <class T, metal::narrow::if_floating<T> = 0>                    \
  constexpr float operator op(S a, T b) {                                  \
    return float(a) op float(b);                                           \
  }                                                                        \
  template <class T, metal::narrow::if_floating<T> = 0>                    \
  constexpr float operator op(T a, S b) {                                  \
    return float(a) op float(b);                                           \
  }                                                                        \
  template <class T>                                                       \
  constexpr auto operator op##=(S& a, T b)->decltype(a = a op b) {         \
    return a = a op b;                                                     \
  }
#define METAL_ON_CPU_OPERATIONS(S)                    \
  METAL_ON_CPU_OPERATION(S, +)                        \
  METAL_ON_CPU_OPERATION(S, -)                        \
  METAL_ON_CPU_OPERATION(S, *)                        \
  METAL_ON_CPU_OPERATION(S, /)                        \
  constexpr S operator-(S a) { return S(-float(a)); } \
  constexpr S operator+(S a) { return a; }
METAL_ON_CPU_OPERATIONS(half)
METAL_ON_CPU_OPERATIONS(bfloat)
#undef METAL_ON_CPU_OPERATIONS
#undef METAL_ON_CPU_OPERATION

namespace metal {

template <class T>
struct numeric_limits : std::numeric_limits<T> {};

#define METAL_ON_CPU_LIMITS(S, largest, smallest, step)                                      \
  template <>                                                                                \
  struct numeric_limits<S> {                                                                 \
    static constexpr S infinity() { return S(__builtin_inff()); }                            \
    static constexpr S quiet_NaN() { return S(__builtin_nanf("")); }                         \
    static constexpr S max() { return S(largest); }                                          \
    static constexpr S lowest() { return S(-largest); }                                      \
    static constexpr S min() { return S(smallest); }                                         \
    static constexpr S epsilon() { return S(step); }                                         \
  };
METAL_ON_CPU_LIMITS(half, 65504.0f, 0x1p-14f, 0x1p-10f)
METAL_ON_CPU_LIMITS(bfloat, 0x1.fep127f, 0x1p-126f, 0x1p-7f)
#undef METAL_ON_CPU_LIMITS

using ::bfloat;
using ::half;
using std::conditional_t;
using std::enable_if_t;
using std::integral_constant;
using std::is_same;
using std::is_same_v;

template <class T>
struct is_floating_point : std::is_floating_point<T> {};
template <>
struct is_floating_point<half> : std::true_type {};
template <>
struct is_floating_point<bfloat> : std::true_type {};
template <class T>
struct is_scalar : std::integral_constant<bool, std::is_integral<T>::value ||
                                                    metal::is_floating_point<T>::value> {};

}  // namespace metal

using metal::as_type;

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX 0x1.fffffep127f
#define HALF_MAX half(65504.0f)
#define M_PI_F 3.14159265358979323846f
#define M_E_F 2.71828182845904523536f
#define M_LN2_F 0.69314718055994530942f
#define M_LOG2E_F 1.44269504088896340736f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_SQRT2_F 1.41421356237309504880f
#define M_2_SQRTPI_F 1.12837916709551257390f
