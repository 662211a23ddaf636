// MSL's vectors of two to four scalars, aligned as MSL aligns them (three take the room of four).
#pragma once

#include "scalars.h"

namespace metal {

template <class T, int N>
struct vec;

// Some members of a vector under one name, such as v.xy. It is written and read as a vector.
template <class T, int N, int... I>
struct swizzle {
  T e[N];
  swizzle() = default;
  swizzle(const swizzle&) = default;
  operator vec<T, sizeof...(I)>() const { return vec<T, sizeof...(I)>(e[I]...); }
  swizzle& operator=(const vec<T, sizeof...(I)>& from) {
    int k = 0;
    ((e[I] = from[k++]), ...);
    return *this;
  }
  // Its own copy would take all members.
  swizzle& operator=(const swizzle& from) { return *this = vec<T, sizeof...(I)>(from); }
};

// The copies are spelled out because compilers then check the alignment of what is copied.
#define METAL_ON_CPU_VECTOR_BASICS(N)                                       \
  vec() = default;                                                          \
  constexpr vec(const vec& from) : e{} { *this = from; }                    \
  constexpr vec& operator=(const vec& from) {                               \
    for (int i = 0; i < N; ++i) e[i] = from.e[i];                           \
    return *this;                                                           \
  }                                                                         \
  constexpr const T& operator[](int i) const { return e[i]; }               \
  constexpr T& operator[](int i) { return e[i]; }                           \
  template <class U>                                                        \
  explicit vec(const vec<U, N>& from) {                                     \
    for (int i = 0; i < N; ++i) e[i] = T(from[i]);                          \
  }

template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    T e[2];
    struct { T x, y; };
    struct { T r, g; };
    swizzle<T, 2, 0, 1> xy;
    swizzle<T, 2, 1, 0> yx;
  };
  METAL_ON_CPU_VECTOR_BASICS(2)
  constexpr vec(T a) : e{a, a} {}
  constexpr vec(T a, T b) : e{a, b} {}
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    T e[3];
    struct { T x, y, z; };
    struct { T r, g, b; };
    swizzle<T, 3, 0, 1> xy;
    swizzle<T, 3, 1, 2> yz;
    swizzle<T, 3, 0, 2> xz;
    swizzle<T, 3, 0, 1, 2> xyz;
  };
  METAL_ON_CPU_VECTOR_BASICS(3)
  constexpr vec(T a) : e{a, a, a} {}
  constexpr vec(T a, T b, T c) : e{a, b, c} {}
  vec(vec<T, 2> ab, T c) : e{ab.x, ab.y, c} {}
  vec(T a, vec<T, 2> bc) : e{a, bc.x, bc.y} {}
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    T e[4];
    struct { T x, y, z, w; };
    struct { T r, g, b, a; };
    swizzle<T, 4, 0, 1> xy;
    swizzle<T, 4, 1, 2> yz;
    swizzle<T, 4, 2, 3> zw;
    swizzle<T, 4, 0, 2> xz;
    swizzle<T, 4, 1, 3> yw;
    swizzle<T, 4, 0, 1, 2> xyz;
    swizzle<T, 4, 1, 2, 3> yzw;
    swizzle<T, 4, 0, 1, 2, 3> xyzw;
  };
  METAL_ON_CPU_VECTOR_BASICS(4)
  constexpr vec(T v) : e{v, v, v, v} {}
  constexpr vec(T p, T q, T s, T t) : e{p, q, s, t} {}
  vec(vec<T, 2> pq, vec<T, 2> st) : e{pq.x, pq.y, st.x, st.y} {}
  vec(vec<T, 2> pq, T s, T t) : e{pq.x, pq.y, s, t} {}
  vec(vec<T, 3> pqs, T t) : e{pqs.x, pqs.y, pqs.z, t} {}
  vec(T p, vec<T, 3> qst) : e{p, qst.x, qst.y, qst.z} {}
};
#undef METAL_ON_CPU_VECTOR_BASICS

template <class S>
using if_scalar = std::enable_if_t<is_scalar<S>::value, int>;

template <int N, class R, class F>
inline vec<R, N> each(F f) {
  vec<R, N> result;
  for (int i = 0; i < N; ++i) result[i] = f(i);
  return result;
}

#define METAL_ON_CPU_BINARY(op, R)                                                    \
  template <class T, int N>                                                           \
  inline vec<R, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {              \
    return each<N, R>([&](int i) { return R(a[i] op b[i]); });                        \
  }                                                                                   \
  template <class T, int N, class S, if_scalar<S> = 0>                                \
  inline vec<R, N> operator op(const vec<T, N>& a, S b) {                             \
    return each<N, R>([&](int i) { return R(a[i] op T(b)); });                        \
  }                                                                                   \
  template <class T, int N, class S, if_scalar<S> = 0>                                \
  inline vec<R, N> operator op(S a, const vec<T, N>& b) {                             \
    return each<N, R>([&](int i) { return R(T(a) op b[i]); });                        \
  }
#define METAL_ON_CPU_ARITHMETIC(op)                                                   \
  METAL_ON_CPU_BINARY(op, T)                                                          \
  template <class T, int N, class S>                                                  \
  inline vec<T, N>& operator op##=(vec<T, N>& a, const S& b) {                        \
    return a = a op b;                                                                \
  }
METAL_ON_CPU_ARITHMETIC(+)
METAL_ON_CPU_ARITHMETIC(-)
METAL_ON_CPU_ARITHMETIC(*)
METAL_ON_CPU_ARITHMETIC(/)
METAL_ON_CPU_ARITHMETIC(%)
METAL_ON_CPU_ARITHMETIC(&)
METAL_ON_CPU_ARITHMETIC(|)
METAL_ON_CPU_ARITHMETIC(^)
METAL_ON_CPU_ARITHMETIC(<<)
METAL_ON_CPU_ARITHMETIC(>>)
METAL_ON_CPU_BINARY(==, bool)
METAL_ON_CPU_BINARY(!=, bool)
METAL_ON_CPU_BINARY(<, bool)
METAL_ON_CPU_BINARY(<=, bool)
METAL_ON_CPU_BINARY(>, bool)
METAL_ON_CPU_BINARY(>=, bool)
#undef METAL_ON_CPU_ARITHMETIC
#undef METAL_ON_CPU_BINARY

template <class T, int N>
inline vec<T, N> operator-(const vec<T, N>& a) {
  return each<N, T>([&](int i) { return T(-a[i]); });
}
template <class T, int N>
inline vec<T, N> operator~(const vec<T, N>& a) {
  return each<N, T>([&](int i) { return T(~a[i]); });
}

// The same scalars without the alignment, for memory that is packed.
template <class T, int N>
struct packed_vec {
  T e[N];
  packed_vec() = default;
  packed_vec(const vec<T, N>& from) {
    for (int i = 0; i < N; ++i) e[i] = from[i];
  }
  operator vec<T, N>() const {
    return each<N, T>([&](int i) { return e[i]; });
  }
  const T& operator[](int i) const { return e[i]; }
  T& operator[](int i) { return e[i]; }
};

#define METAL_ON_CPU_VECTORS(T)       \
  typedef vec<T, 2> T##2;             \
  typedef vec<T, 3> T##3;             \
  typedef vec<T, 4> T##4;             \
  typedef packed_vec<T, 2> packed_##T##2; \
  typedef packed_vec<T, 3> packed_##T##3; \
  typedef packed_vec<T, 4> packed_##T##4;
METAL_ON_CPU_VECTORS(bool)
METAL_ON_CPU_VECTORS(char)
METAL_ON_CPU_VECTORS(uchar)
METAL_ON_CPU_VECTORS(short)
METAL_ON_CPU_VECTORS(ushort)
METAL_ON_CPU_VECTORS(int)
METAL_ON_CPU_VECTORS(uint)
METAL_ON_CPU_VECTORS(long)
METAL_ON_CPU_VECTORS(ulong)
METAL_ON_CPU_VECTORS(half)
METAL_ON_CPU_VECTORS(bfloat)
METAL_ON_CPU_VECTORS(float)
#undef METAL_ON_CPU_VECTORS

template <class T, int N>
inline T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; ++i) sum = sum + a[i] * b[i];
  return sum;
}
template <int N>
inline bool any(const vec<bool, N>& a) {
  for (int i = 0; i < N; ++i)
    if (a[i]) return true;
  return false;
}
template <int N>
inline bool all(const vec<bool, N>& a) {
  for (int i = 0; i < N; ++i)
    if (!a[i]) return false;
  return true;
}

}  // namespace metal
