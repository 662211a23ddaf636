// How a threadgroup shares rows and the vector that they are multiplied by.
//
// Threads: SIMDGROUPS SIMD groups of 32 lanes. `Lanes` lanes work on the same ROWS rows, so a
// SIMD group has 32 / Lanes such sets. x goes through threadgroup memory in chunks, converted,
// scaled and read by every lane from there. Two tiles take turns, so that one barrier per chunk
// is enough: nobody writes a tile before everybody has passed the barrier after its last use.

#pragma once

#include <metal_stdlib>

#include "packing.h"

using namespace metal;

namespace flashmoe {

constant constexpr int SIMDGROUPS = 4;
constant constexpr int ROWS = 4;
constant constexpr int CHUNK = 1024;
// One float between blocks keeps the lanes of a SIMD group in different banks.
constant constexpr int TILE_STRIDE = BLOCK + 1;
constant constexpr int TILE_FLOATS = CHUNK / BLOCK * TILE_STRIDE;

// The sizes that a kernel is given.
constant constexpr int N_ROWS = 0;
constant constexpr int N_COLS = 1;
constant constexpr int TOP_K = 2;
constant constexpr int ACTIVATION = 3;

// The first of a lane's ROWS rows.
template <int Lanes>
METAL_FUNC uint first_row(uint threadgroup_index, uint simdgroup, uint lane) {
  const uint sets = 32 / Lanes;
  return ((threadgroup_index * SIMDGROUPS + simdgroup) * sets + lane / Lanes) * ROWS;
}

// tile = factor * x[0 .. width), prescaled for the matrix.
template <class M, typename T>
METAL_FUNC void stage(
    const device T* x,
    float factor,
    uint width,
    threadgroup float* tile,
    uint simdgroup,
    uint lane) {
  const float scale = factor * M::prescale(lane);
  for (uint block = simdgroup; block * BLOCK + lane < width; block += SIMDGROUPS)
    tile[block * TILE_STRIDE + lane] = scale * float(x[block * BLOCK + lane]);
}

// A unit of the staged x.
template <class M>
METAL_FUNC void load_unit(const threadgroup float* tile, uint unit, thread float* x) {
  const uint column = unit * M::VALUES;
  const threadgroup float* from = tile + column / BLOCK * TILE_STRIDE + column % BLOCK;
#pragma unroll
  for (int i = 0; i < M::VALUES; ++i) x[i] = from[i];
}

// Lanes beyond the last row read that one again, and what they find is not written.
METAL_FUNC uint within(uint row, uint n_rows) { return row < n_rows ? row : n_rows - 1; }

// The sum over the lanes of a set; every lane gets it.
template <int Lanes>
METAL_FUNC float sum_over_lanes(float value) {
#pragma unroll
  for (int offset = Lanes / 2; offset > 0; offset /= 2)
    value += simd_shuffle_xor(value, ushort(offset));
  return value;
}

}  // namespace flashmoe
