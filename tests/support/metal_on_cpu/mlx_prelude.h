// What MLX puts before a custom kernel, as far as a kernel may use it or collide with it.
#pragma once

#include <metal_stdlib>

using namespace metal;

typedef half float16_t;
typedef bfloat bfloat16_t;

template <typename U>
struct WorkPerThread;
template <typename U>
struct Limits;
template <typename T>
struct complex_t;
typedef complex_t<float> complex64_t;
template <int DIM, typename OffsetT = size_t, bool General = true>
struct LoopedElemToLoc;

static constant constexpr int MAX_REDUCE_SPECIALIZED_DIMS = 4;
static constant constexpr int REDUCE_N_READS = 4;
static constant constexpr int REDUCE_N_WRITES = 4;
static constant constexpr int SOFTMAX_N_READS = 4;
static constant constexpr int RMS_N_READS = 4;
static constant constexpr int RMS_LOOPED_LIMIT = 4096;

template <typename T, typename U>
inline T ceildiv(T n, U m) {
  return (n + m - 1) / m;
}

template <typename IdxT = int64_t>
inline IdxT elem_to_loc(IdxT elem, constant const int* shape, constant const int64_t* strides,
                        int ndim) {
  IdxT loc = 0;
  for (int i = ndim; i-- > 0; elem /= shape[i]) loc += (elem % shape[i]) * IdxT(strides[i]);
  return loc;
}
