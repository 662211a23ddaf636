#include "rows.h"

#include <string.h>

#include <algorithm>

namespace flashmoe {
namespace {

// Columns are taken in blocks: scratch arrays have a fixed size and stay in cache, and sums of
// sums round less. The same blocks on every path, because they decide how sums round.
constexpr int64_t kColumns = 1024;
constexpr int64_t kChunk = 96;  // pairs that share one expansion of the weights to floats
constexpr int64_t kMostGroups = kColumns / kBlock;

bool is_quantized(const fm_matrix& w) { return w.format == FM_AFFINE || w.format == FM_MXFP4; }

int64_t bits_per_value(const fm_matrix& w) {
  if (is_quantized(w)) return w.bits;
  return w.format == FM_F32 ? 32 : 16;
}

int64_t scale_bytes(const fm_matrix& w) {
  if (w.format == FM_MXFP4) return 1;
  return w.scale_dtype == FM_F32 ? 4 : 2;
}

// e8m0: a power of two, the exponent's field of a float32; 0 is the subnormal 2^-127.
void widen_e8m0(const uint8_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = in[i] ? uint32_t(in[i]) << 23 : 0x00400000u;
    memcpy(out + i, &bits, sizeof bits);
  }
}

// Scales and biases of a few rows as floats.
class Scales {
 public:
  Scales(const Kernels& kernels, const fm_matrix& w, int64_t slot)
      : kernels_(kernels), w_(w), row_bytes_(w.cols / std::max(w.group_size, 1) * scale_bytes(w)) {
    scales_ = static_cast<const uint8_t*>(w.scales) + slot * w.scales_slot_bytes;
    if (w.format == FM_AFFINE)
      biases_ = static_cast<const uint8_t*>(w.biases) + slot * w.biases_slot_bytes;
  }

  // Points the tile at those of `rows` rows from `row` on, from `column` on.
  void set(Tile& tile, int64_t row, int rows, int64_t column) {
    const int64_t groups = tile.values / w_.group_size;
    const int64_t offset = row * row_bytes_ + column / w_.group_size * scale_bytes(w_);
    if (w_.format == FM_AFFINE && w_.scale_dtype == FM_F32) {
      tile.scales = reinterpret_cast<const float*>(scales_ + offset);
      tile.biases = reinterpret_cast<const float*>(biases_ + offset);
      tile.scale_stride = row_bytes_ / int64_t(sizeof(float));
      return;
    }
    // Rows that are taken whole lie next to each other.
    const bool whole = tile.values == w_.cols;
    const int64_t runs = whole ? 1 : rows, length = whole ? rows * groups : groups;
    for (int64_t r = 0; r < runs; ++r) {
      widen(scales_ + offset + r * row_bytes_, length, wide_scales_ + r * kMostGroups);
      if (biases_)
        widen(biases_ + offset + r * row_bytes_, length, wide_biases_ + r * kMostGroups);
    }
    tile.scales = wide_scales_;
    tile.biases = wide_biases_;
    tile.scale_stride = whole ? groups : kMostGroups;
  }

 private:
  void widen(const uint8_t* in, int64_t n, float* out) {
    if (w_.format == FM_MXFP4) return widen_e8m0(in, n, out);
    const auto* halves = reinterpret_cast<const uint16_t*>(in);
    (w_.scale_dtype == FM_BF16 ? kernels_.widen_bf16 : kernels_.widen_f16)(halves, n, out);
  }

  const Kernels& kernels_;
  const fm_matrix& w_;
  const int64_t row_bytes_;
  const uint8_t* scales_ = nullptr;
  const uint8_t* biases_ = nullptr;
  float wide_scales_[kMaxRows * kMostGroups];
  float wide_biases_[kMaxRows * kMostGroups];
};

struct Slot {
  const Kernels& kernels;
  const fm_matrix& w;
  const Group& group;
  const Codec& codec;
  const uint8_t* weight;
  int64_t row_bytes;
  Scales scales;

  Slot(const Kernels& k, const fm_matrix& matrix, const Group& g)
      : kernels(k), w(matrix), group(g), codec(codec_of(k, matrix)),
        weight(static_cast<const uint8_t*>(matrix.weight) + g.slot * matrix.weight_slot_bytes),
        row_bytes(matrix.cols * bits_per_value(matrix) / 8), scales(k, matrix, g.slot) {}

  // The tile of `rows` rows from `row` on, over a block of columns.
  Tile tile(int64_t row, int rows, int64_t column) {
    Tile tile = {};
    tile.weight = weight + row * row_bytes + column * bits_per_value(w) / 8;
    tile.weight_stride = row_bytes;
    tile.group_size = w.group_size;
    tile.values = std::min(kColumns, w.cols - column);
    if (is_quantized(w)) scales.set(tile, row, rows, column);
    return tile;
  }
};

// Fewer rows than a tile has: it computes the one row several times.
void repeat_row(Tile& tile) { tile.weight_stride = tile.scale_stride = 0; }

// Pairs from `first` on, the last one repeated where a tile has more than are left.
void point_at(const Group& group, int64_t first, int64_t last, int64_t column, int pairs,
              const float** x) {
  for (int p = 0; p < pairs; ++p) x[p] = group.x[std::min(first + p, last)] + column;
}

// sums [rows, pairs, lanes] to y, for `kept` rows from `row` on and pairs first .. last.
void finish(const Slot& slot, const float* sums, Shape shape, int skipped, int kept, int64_t row,
            int64_t first, int64_t last) {
  float out[kMaxRows * kMaxPairs];
  slot.kernels.reduce(sums, shape.rows * shape.pairs, out);
  const int pairs = int(std::min<int64_t>(shape.pairs, last - first + 1));
  for (int r = 0; r < kept; ++r)
    for (int p = 0; p < pairs; ++p)
      slot.group.y[first + p][row + r] = out[(skipped + r) * shape.pairs + p];
}

// Straight from the packed weights: bound by reading them.
void stream(Slot& slot, Shape shape, TileFunction function, int64_t begin, int64_t end) {
  alignas(64) float sums[kMaxRows * kMaxPairs * kMaxLanes];
  const float* x[kMaxPairs];
  const bool alone = slot.w.rows < shape.rows;
  const int64_t sums_bytes = int64_t(sizeof(float)) * shape.rows * shape.pairs * slot.kernels.lanes;
  const int64_t step = alone ? 1 : shape.rows, last = slot.group.count - 1;
  for (int64_t row = begin; row < end; row += step) {
    // The last tile moves up to end where the rows do; what it computes again is dropped.
    const int64_t top = alone ? row : std::min(row, slot.w.rows - shape.rows);
    for (int64_t first = 0; first <= last; first += shape.pairs) {
      memset(sums, 0, sums_bytes);
      for (int64_t column = 0; column < slot.w.cols; column += kColumns) {
        Tile tile = slot.tile(top, int(step), column);
        if (alone) repeat_row(tile);
        point_at(slot.group, first, last, column, shape.pairs, x);
        tile.x = x;
        tile.sums = sums;
        function(tile);
      }
      const int skipped = int(row - top);
      const int kept = int(std::min(end, top + step) - row);
      finish(slot, sums, shape, skipped, kept, row, first, last);
    }
  }
}

// Through floats: each row is unpacked once for many pairs.
void expand(Slot& slot, int64_t begin, int64_t end) {
  alignas(64) float expanded[kMaxRows * kColumns] = {};
  alignas(64) float sums[(kChunk + kMaxPairs) * kMaxRows * kMaxLanes];
  const Shape shape = slot.kernels.many_shape;
  const float* x[kMaxPairs];
  const int64_t panel_floats = int64_t(shape.rows) * shape.pairs * slot.kernels.lanes;
  for (int64_t chunk = 0; chunk < slot.group.count; chunk += kChunk) {
    const int64_t last = std::min(chunk + kChunk, slot.group.count) - 1;
    const int64_t panels = (last - chunk) / shape.pairs + 1;
    for (int64_t row = begin; row < end; row += shape.rows) {
      const int rows = int(std::min<int64_t>(shape.rows, end - row));
      memset(sums, 0, panels * panel_floats * int64_t(sizeof(float)));
      for (int64_t column = 0; column < slot.w.cols; column += kColumns) {
        Tile tile = slot.tile(row, rows, column);
        for (int r = 0; r < rows; ++r) {
          slot.codec.expand(tile, expanded + r * kColumns);
          tile.weight += tile.weight_stride;
          tile.scales += tile.scale_stride;
          tile.biases += tile.scale_stride;
        }
        tile.weight = reinterpret_cast<const uint8_t*>(expanded);
        tile.weight_stride = kColumns * int64_t(sizeof(float));
        tile.x = x;
        tile.sums = sums;
        for (int64_t first = chunk; first <= last; first += shape.pairs) {
          point_at(slot.group, first, last, column, shape.pairs, x);
          slot.kernels.many(tile);
          tile.sums += panel_floats;
        }
      }
      const float* panel = sums;
      for (int64_t first = chunk; first <= last; first += shape.pairs, panel += panel_floats)
        finish(slot, panel, shape, 0, rows, row, first, last);
    }
  }
}

}  // namespace

const Codec& codec_of(const Kernels& kernels, const fm_matrix& w) {
  static constexpr int kAffine[] = {-1, -1, kAffine2, kAffine3, kAffine4, kAffine5, kAffine6, -1,
                                    kAffine8};
  if (w.format == FM_AFFINE) return kernels.codecs[kAffine[w.bits]];
  if (w.format == FM_MXFP4) return kernels.codecs[kMxfp4];
  return kernels.codecs[w.format == FM_F32 ? kF32 : w.format == FM_BF16 ? kBF16 : kF16];
}

void multiply_rows(const Kernels& kernels, const fm_matrix& w, const Group& group, int64_t begin,
                   int64_t end) {
  Slot slot(kernels, w, group);
  if (group.count == 1)
    stream(slot, kernels.single_shape, slot.codec.single, begin, end);
  else if (group.count <= kernels.few_shape.pairs)
    stream(slot, kernels.few_shape, slot.codec.few, begin, end);
  else
    expand(slot, begin, end);
}

}  // namespace flashmoe
