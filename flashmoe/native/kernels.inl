// The kernels, once for every instruction set: include after a `simd_*.h` that defines `Simd`.
//
// Each (row, pair) has one vector of partial sums that takes a block's columns in order, whatever
// the shape of the tile, so every path gives the same bits.

#include <string.h>

#include "activations.inl"
#include "attention.inl"
#include "fit.inl"
#include "kernels.h"

namespace flashmoe {
namespace {

using Vector = Simd::Vector;
constexpr int kLanes = Simd::kLanes;

template <int Rows, int Pairs>
struct Sums {
  Vector at[Rows][Pairs];

  Sums() {
    for (int r = 0; r < Rows; ++r)
      for (int p = 0; p < Pairs; ++p) at[r][p] = Simd::zero();
  }
  void add_to(float* total) const {
    for (int r = 0; r < Rows; ++r)
      for (int p = 0; p < Pairs; ++p) {
        float* place = total + (r * Pairs + p) * kLanes;
        Simd::store(place, Simd::add(Simd::load(place), at[r][p]));
      }
  }
};

// --- quantized ----------------------------------------------------------------------------------

template <int Bits>
struct Affine {
  static constexpr int64_t kBlockBytes = kBlock * Bits / 8;
  typename Simd::template Affine<Bits> values;
  Affine(const float* scale, const float* bias) : values(scale, bias) {}
  static const float* biases(const Tile& tile) { return tile.biases; }
};

struct Mxfp4 {
  static constexpr int64_t kBlockBytes = kBlock * 4 / 8;
  Simd::Mxfp4 values;
  Mxfp4(const float* scale, const float*) : values(scale) {}
  static const float* biases(const Tile& tile) { return tile.scales; }
};

// `Blocks` consecutive blocks share a scale, and 1 << shift such runs do.
template <class Format, int Blocks, int Rows, int Pairs>
void quantized_runs(const Tile& tile, int shift) {
  constexpr int64_t run_bytes = Blocks * Format::kBlockBytes;
  constexpr int64_t run_values = Blocks * kBlock;
  const int64_t stride = tile.weight_stride, scale_stride = tile.scale_stride;
  const float* scales = tile.scales;
  const float* biases = Format::biases(tile);
  const float* x[Pairs];
  for (int p = 0; p < Pairs; ++p) x[p] = tile.x[p];
  Sums<Rows, Pairs> sums;
  const int64_t runs = tile.values / run_values;
  for (int64_t run = 0; run < runs; ++run) {
    const uint8_t* weight = tile.weight + run * run_bytes;
    const int64_t group = run >> shift;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Format format(scales + r * scale_stride + group, biases + r * scale_stride + group);
      const uint8_t* row = weight + r * stride;
      // The same place in the tile below this one, which is what is wanted next.
      __builtin_prefetch(row + Rows * stride);
#pragma GCC unroll 4
      for (int b = 0; b < Blocks; ++b) {
#pragma GCC unroll 8
        for (int v = 0; v < kBlock / kLanes; ++v) {
          const Vector w = format.values.at(row + b * Format::kBlockBytes, v);
          const int64_t column = run * run_values + b * kBlock + v * kLanes;
#pragma GCC unroll 8
          for (int p = 0; p < Pairs; ++p)
            sums.at[r][p] = Simd::fma(w, Simd::load(x[p] + column), sums.at[r][p]);
        }
      }
    }
  }
  sums.add_to(tile.sums);
}

inline int shift_of(int64_t group_size) { return group_size == 32 ? 0 : group_size == 64 ? 1 : 2; }

template <class Format, int Rows, int Pairs>
void quantized_tile(const Tile& tile) {
  quantized_runs<Format, 1, Rows, Pairs>(tile, shift_of(tile.group_size));
}

// Four bits are what most models have: scales are set up once per group.
template <int Rows, int Pairs>
void affine4_tile(const Tile& tile) {
  if (tile.group_size == 32) return quantized_runs<Affine<4>, 1, Rows, Pairs>(tile, 0);
  if (tile.group_size == 64) return quantized_runs<Affine<4>, 2, Rows, Pairs>(tile, 0);
  return quantized_runs<Affine<4>, 4, Rows, Pairs>(tile, 0);
}

template <class Format>
void quantized_expand(const Tile& tile, float* out) {
  const int shift = shift_of(tile.group_size);
  const float* biases = Format::biases(tile);
  for (int64_t block = 0; block < tile.values / kBlock; ++block) {
    const Format format(tile.scales + (block >> shift), biases + (block >> shift));
    for (int v = 0; v < kBlock / kLanes; ++v)
      Simd::store(out + block * kBlock + v * kLanes,
                  format.values.at(tile.weight + block * Format::kBlockBytes, v));
  }
}

// --- floats -------------------------------------------------------------------------------------

struct F32 {
  using Value = float;
  static Vector load(const uint8_t* at) { return Simd::load(reinterpret_cast<const float*>(at)); }
};
struct BF16 {
  using Value = uint16_t;
  static Vector load(const uint8_t* at) { return Simd::load_bf16(at); }
};
struct F16 {
  using Value = uint16_t;
  static Vector load(const uint8_t* at) { return Simd::load_f16(at); }
};

// The last, partial vector of a row, with zeros behind it.
template <class Format>
Vector load_tail(const uint8_t* from, int64_t count) {
  typename Format::Value padded[kLanes] = {};
  memcpy(padded, from, count * sizeof(typename Format::Value));
  return Format::load(reinterpret_cast<const uint8_t*>(padded));
}

template <class Format, int Rows, int Pairs>
void float_tile(const Tile& tile) {
  constexpr int64_t value_bytes = sizeof(typename Format::Value);
  const int64_t stride = tile.weight_stride;
  const float* x[Pairs];
  for (int p = 0; p < Pairs; ++p) x[p] = tile.x[p];
  Sums<Rows, Pairs> sums;
  const int64_t whole = tile.values - tile.values % kLanes, rest = tile.values - whole;
  for (int64_t column = 0; column < whole; column += kLanes) {
    Vector w[Rows];
    for (int r = 0; r < Rows; ++r)
      w[r] = Format::load(tile.weight + r * stride + column * value_bytes);
#pragma GCC unroll 8
    for (int p = 0; p < Pairs; ++p) {
      const Vector xs = Simd::load(x[p] + column);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sums.at[r][p] = Simd::fma(w[r], xs, sums.at[r][p]);
    }
  }
  if (rest) {
    for (int p = 0; p < Pairs; ++p) {
      const Vector xs = load_tail<F32>(reinterpret_cast<const uint8_t*>(x[p] + whole), rest);
      for (int r = 0; r < Rows; ++r) {
        const uint8_t* row = tile.weight + r * stride + whole * value_bytes;
        sums.at[r][p] = Simd::fma(load_tail<Format>(row, rest), xs, sums.at[r][p]);
      }
    }
  }
  sums.add_to(tile.sums);
}

template <class Format>
void float_expand(const Tile& tile, float* out) {
  constexpr int64_t value_bytes = sizeof(typename Format::Value);
  const int64_t whole = tile.values - tile.values % kLanes, rest = tile.values - whole;
  for (int64_t column = 0; column < whole; column += kLanes)
    Simd::store(out + column, Format::load(tile.weight + column * value_bytes));
  if (rest) {
    float padded[kLanes];
    Simd::store(padded, load_tail<Format>(tile.weight + whole * value_bytes, rest));
    memcpy(out + whole, padded, rest * sizeof(float));
  }
}

// --- the table ----------------------------------------------------------------------------------

void reduce(const float* sums, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = Simd::sum(Simd::load(sums + i * kLanes));
}

template <class Format>
void widen(const uint16_t* in, int64_t n, float* out) {
  Tile tile = {};
  tile.weight = reinterpret_cast<const uint8_t*>(in);
  tile.values = n;
  float_expand<Format>(tile, out);
}

constexpr Shape kSingle = Simd::kSingle, kFew = Simd::kFew, kMany = Simd::kMany;
static_assert(kSingle.rows <= kMaxRows && kMany.pairs <= kMaxPairs && kLanes <= kMaxLanes, "");

template <class Format>
constexpr Codec float_codec() {
  return {float_tile<Format, kSingle.rows, kSingle.pairs>,
          float_tile<Format, kFew.rows, kFew.pairs>, float_expand<Format>};
}

template <class Format>
constexpr Codec quantized_codec() {
  return {quantized_tile<Format, kSingle.rows, kSingle.pairs>,
          quantized_tile<Format, kFew.rows, kFew.pairs>, quantized_expand<Format>};
}

constexpr Codec affine4_codec() {
  return {affine4_tile<kSingle.rows, kSingle.pairs>, affine4_tile<kFew.rows, kFew.pairs>,
          quantized_expand<Affine<4>>};
}

constexpr Kernels make_kernels() {
  return {Simd::kName,
          kLanes,
          kSingle,
          kFew,
          kMany,
          {float_codec<F32>(), float_codec<BF16>(), float_codec<F16>(), quantized_codec<Mxfp4>(),
           quantized_codec<Affine<2>>(), quantized_codec<Affine<3>>(), affine4_codec(),
           quantized_codec<Affine<5>>(), quantized_codec<Affine<6>>(),
           quantized_codec<Affine<8>>()},
          float_tile<F32, kMany.rows, kMany.pairs>,
          reduce,
          activate,
          outer,
          weigh,
          blend,
          widen<BF16>,
          widen<F16>,
          fit_group};
}

}  // namespace
}  // namespace flashmoe
