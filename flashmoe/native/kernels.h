// What one instruction set provides: inner products of a tile of rows with a few rows of x.
//
// Files that define a table are compiled with that set's flags, so nothing here may be inline
// code: the linker would keep one copy for every machine.
#ifndef FLASHMOE_KERNELS_H
#define FLASHMOE_KERNELS_H

#include <stdint.h>

#include "flashmoe_fit.h"
#include "flashmoe_native.h"

namespace flashmoe {

// The least unit of quantized values: the smallest group, a whole number of words at any width.
constexpr int64_t kBlock = 32;
constexpr int kMaxLanes = 16;
constexpr int kMaxRows = 8;
constexpr int kMaxPairs = 6;

// `rows` x `pairs` inner products over a block of columns, added to vectors of partial sums.
struct Tile {
  const uint8_t* weight;  // first row, at the first column
  int64_t weight_stride;  // bytes from row to row; 0 repeats one row
  const float* scales;    // first row's, at the first column's group; null for floats
  const float* biases;    // null unless affine
  int64_t scale_stride;   // floats from row to row
  int64_t group_size;
  int64_t values;
  const float* const* x;  // one pointer per pair, at the first column
  float* sums;            // [rows, pairs, lanes], aligned to 64 bytes
};

using TileFunction = void (*)(const Tile&);

// The first row of a tile as floats; ignores x and sums.
using ExpandFunction = void (*)(const Tile&, float* out);

struct Shape {
  int rows;
  int pairs;
};

// One weight format.
struct Codec {
  TileFunction single;  // the table's single_shape
  TileFunction few;     // the table's few_shape
  ExpandFunction expand;
};

// out[i, n] = sum over k of a[i * a_row + k * a_step] * b[k * b_row + n]
struct Outer {
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_row;
  int64_t rows, depth, columns;  // columns whole vectors
  float* out;
  int64_t out_row;
  const float* fade;    // [rows], what is in out counts so much and is added; null: it is nothing
  const uint8_t* kept;  // [rows], out changes only where not 0; null: everywhere
};

// Rows of a softmax come in whole vectors of any width.
constexpr int kRowsTogether = 16;

// Scores of a block of keys become shares of the largest that each row has met, itself included.
struct Softmax {
  float* scores;  // [keys, rows], one column for each row
  int64_t rows, keys;
  const int32_t* visible;  // [rows], how many of the keys a row sees
  const float* added;      // [keys, rows]; null: nothing
  float* most;             // [rows], the largest score so far
  float* total;            // [rows], the sum of shares so far
  float* fade;             // [rows], what came before is to be multiplied with that
  uint8_t* kept;           // [rows], whether the block has anything for a row
};

enum CodecName { kF32, kBF16, kF16, kMxfp4, kAffine2, kAffine3, kAffine4, kAffine5, kAffine6,
                 kAffine8, kCodecs };

struct Kernels {
  const char* isa;
  int lanes;
  Shape single_shape;  // one row of x: as many rows as hide the latency of an addition
  Shape few_shape;
  Shape many_shape;
  Codec codecs[kCodecs];
  TileFunction many;  // float32 rows, the table's many_shape
  // out[i] = sum of sums[i, :] for i < n
  void (*reduce)(const float* sums, int64_t n, float* out);
  // gate[i] = activation(gate[i], up[i]) for i < n; up null where there is no gate
  void (*activate)(const fm_activation& activation, float* gate, const float* up, int64_t n);
  void (*outer)(const Outer& products);
  void (*weigh)(const Softmax& softmax);
  // to[i] = to[i] * to_share + from[i] * from_share for i < n
  void (*blend)(float* to, float to_share, const float* from, float from_share, int64_t n);
  // n scales of FM_BF16 or FM_F16 to float32
  void (*widen_bf16)(const uint16_t* in, int64_t n, float* out);
  void (*widen_f16)(const uint16_t* in, int64_t n, float* out);
  // one group of fm_fit_groups
  void (*fit_group)(const float* w, const fm_fit& fit, uint32_t* codes, float* scale, float* bias);
};

extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kNeonKernels;
extern const Kernels kPortableKernels;

}  // namespace flashmoe
#endif
