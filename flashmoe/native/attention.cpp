// fm_attend: queries in tiles of rows that share keys, keys in blocks, softmax along the way.
//
// A row of a tile is one head's query; rows of one query are next to each other, so that a tile
// sees about the same keys. Blocks begin at the same keys for every row, and their results are put
// together in order: first within a span of keys, then the spans. Neither the tiles nor who computes
// a span changes a bit.

#include <float.h>
#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <vector>

#include "dispatch.h"
#include "flashmoe_native.h"
#include "pool.h"

namespace flashmoe {
namespace {

constexpr int64_t kKeys = 64;          // in a block
constexpr int64_t kSpan = 8 * kKeys;   // keys whose results are put together first
constexpr int64_t kMostRows = 64;      // in a tile
// Below this many multiplications another thread costs more than it brings.
constexpr int64_t kWorthSharing = 1 << 18;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// What some keys have given to a tile's rows: sums weighted by shares of the largest score.
struct Partial {
  std::vector<float> most, total, sums;  // [rows], [rows], [rows, width]
  int64_t width;

  Partial(int64_t rows, int64_t a_width)
      : most(rows), total(rows), sums(rows * a_width), width(a_width) {}

  void clear() {
    std::fill(most.begin(), most.end(), -INFINITY);
    std::fill(total.begin(), total.end(), 0.0f);
    std::fill(sums.begin(), sums.end(), 0.0f);
  }

  void add(const Kernels& table, const Partial& other, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      if (other.total[r] == 0.0f) continue;
      const float now = std::max(most[r], other.most[r]);
      const float own = total[r] == 0.0f ? 0.0f : expf(most[r] - now);
      const float others = expf(other.most[r] - now);
      table.blend(&sums[r * width], own, &other.sums[r * width], others, width);
      table.blend(&total[r], own, &other.total[r], others, 1);
      most[r] = now;
    }
  }
};

// Rows of one batch entry that share a head of keys and values.
class Tile {
 public:
  Tile(const Kernels& table, const fm_attention& a, int64_t batch, int64_t kv_head, int64_t first,
       int64_t count)
      : table_(table), a_(a), batch_(batch), kv_head_(kv_head), first_(first), count_(count),
        rows_(round_up(count, kRowsTogether)), width_(round_up(a.v_dim, table.lanes)),
        queries_(a.k_dim * rows_), scores_(kKeys * rows_), fade_(rows_), visible_(rows_),
        kept_(rows_) {
    if (a.mask) added_.resize(kKeys * rows_);
    if (a.v_strides[3] != 1 || width_ != a.v_dim) values_.resize(kKeys * width_);
    for (int64_t r = 0; r < count; ++r) {
      const float* q = a.q + offset(a.q_strides, head(r), query(r));
      for (int64_t d = 0; d < a.k_dim; ++d) queries_[d * rows_ + r] = q[d * a.q_strides[3]] * a.scale;
    }
  }

  Partial partial() const { return Partial(rows_, width_); }

  // What the keys from `begin` to `end` give.
  void span(int64_t begin, int64_t end, Partial& out) {
    out.clear();
    for (int64_t key = begin; key < end; key += kKeys) block(key, std::min(kKeys, end - key), out);
  }

  void finish(const Partial& all, float* out) const {
    for (int64_t r = 0; r < count_; ++r) {
      float* to = out + ((batch_ * a_.queries + query(r)) * a_.heads + head(r)) * a_.v_dim;
      float total = all.total[r], factor = 1.0f;
      if (a_.sinks) {
        const float sink = a_.sinks[head(r)], most = std::max(all.most[r], sink);
        factor = total == 0.0f ? 0.0f : expf(all.most[r] - most);
        total = total * factor + expf(sink - most);
      } else if (total == 0.0f) {
        mean(r, to);
        continue;
      }
      factor /= total;
      const float* sums = &all.sums[r * width_];
      for (int64_t d = 0; d < a_.v_dim; ++d) to[d] = sums[d] * factor;
    }
  }

 private:
  int64_t group() const { return a_.heads / a_.kv_heads; }
  int64_t query(int64_t row) const { return (first_ + row) / group(); }
  int64_t head(int64_t row) const { return kv_head_ * group() + (first_ + row) % group(); }
  int64_t offset(const int64_t* strides, int64_t head, int64_t row) const {
    return batch_ * strides[0] + head * strides[1] + row * strides[2];
  }

  // Whether any row sees any of the keys; sets which.
  bool look(int64_t key, int64_t keys) {
    bool any = false;
    for (int64_t r = 0; r < rows_; ++r) {
      int64_t seen = r < count_ ? keys : 0;
      if (a_.mask_kind == FM_CAUSAL_MASK && seen)
        seen = std::clamp<int64_t>(a_.keys - a_.queries + query(r) + 1 - key, 0, keys);
      visible_[r] = int32_t(seen);
      any = any || seen;
    }
    if (!a_.mask) return any;
    any = false;
    for (int64_t r = 0; r < count_; ++r) {
      for (int64_t i = 0; i < keys; ++i) {
        const float value = mask(r, key + i);
        added_[i * rows_ + r] = value <= -FLT_MAX ? -INFINITY : value;
        any = any || !(value <= -FLT_MAX);
      }
    }
    return any;
  }

  float mask(int64_t row, int64_t key) const {
    const int64_t at = offset(a_.mask_strides, head(row), query(row)) + key * a_.mask_strides[3];
    if (a_.mask_kind == FM_ADDED_MASK) return static_cast<const float*>(a_.mask)[at];
    return static_cast<const uint8_t*>(a_.mask)[at] ? 0.0f : -FLT_MAX;
  }

  void block(int64_t key, int64_t keys, Partial& out) {
    if (!look(key, keys)) return;
    const float* k = a_.k + offset(a_.k_strides, kv_head_, key);
    fetch(a_.v, a_.v_strides, key, keys, a_.v_dim);
    table_.outer({k, a_.k_strides[2], a_.k_strides[3], queries_.data(), rows_, keys, a_.k_dim,
                  rows_, scores_.data(), rows_, nullptr, nullptr});
    table_.weigh({scores_.data(), rows_, keys, visible_.data(), a_.mask ? added_.data() : nullptr,
                  out.most.data(), out.total.data(), fade_.data(), kept_.data()});
    if (key + keys < a_.keys)
      fetch(a_.k, a_.k_strides, key + keys, std::min(kKeys, a_.keys - key - keys), a_.k_dim);
    const float* v = a_.v + offset(a_.v_strides, kv_head_, key);
    int64_t v_row = a_.v_strides[2];
    if (!values_.empty()) {
      for (int64_t i = 0; i < keys; ++i)
        for (int64_t d = 0; d < a_.v_dim; ++d)
          values_[i * width_ + d] = v[i * v_row + d * a_.v_strides[3]];
      v = values_.data();
      v_row = width_;
    }
    table_.outer({scores_.data(), 1, rows_, v, v_row, count_, keys, width_, out.sums.data(), width_,
                  fade_.data(), kept_.data()});
  }

  // Has the memory of some keys or values on its way, which products walk in strides.
  void fetch(const float* from, const int64_t* strides, int64_t key, int64_t keys,
             int64_t dim) const {
    constexpr int64_t line = 64 / int64_t(sizeof(float));
    for (int64_t i = 0; i < keys; ++i) {
      const float* row = from + offset(strides, kv_head_, key + i);
      for (int64_t d = 0; d < dim; d += line) __builtin_prefetch(row + d * strides[3]);
    }
  }

  // A softmax over equal scores.
  void mean(int64_t row, float* out) const {
    float n = 0.0f;
    std::fill(out, out + a_.v_dim, 0.0f);
    for (int64_t key = 0; key < a_.keys; ++key) {
      if (a_.mask && mask(row, key) == -INFINITY) continue;
      const float* v = a_.v + offset(a_.v_strides, kv_head_, key);
      for (int64_t d = 0; d < a_.v_dim; ++d) out[d] += v[d * a_.v_strides[3]];
      n += 1.0f;
    }
    for (int64_t d = 0; d < a_.v_dim; ++d) out[d] /= n;
  }

  const Kernels& table_;
  const fm_attention& a_;
  const int64_t batch_, kv_head_, first_, count_, rows_, width_;
  std::vector<float> queries_, scores_, fade_, added_, values_;  // queries_ [k_dim, rows], scaled
  std::vector<int32_t> visible_;
  std::vector<uint8_t> kept_;
};

void attend(const fm_attention& a, float* out) {
  const Kernels& table = kernels();
  const int64_t rows = a.queries * (a.heads / a.kv_heads);
  const int64_t tiles = (rows + kMostRows - 1) / kMostRows;
  const int64_t per_batch = a.kv_heads * tiles, all = a.batch * per_batch;
  const int64_t spans = (a.keys + kSpan - 1) / kSpan;
  // The last rows see most where there is a mask: they begin.
  const auto first_row = [&](int64_t i) { return (tiles - 1 - i % tiles) * kMostRows; };
  const auto tile_rows = [&](int64_t i) { return std::min(kMostRows, rows - first_row(i)); };
  const auto tile = [&](int64_t i) {
    const int64_t kv_head = i / tiles % a.kv_heads;
    return Tile(table, a, i / per_batch, kv_head, first_row(i), tile_rows(i));
  };
  const auto share = [&](int64_t count, const std::function<void(int64_t)>& work) {
    if (a.batch * a.kv_heads * rows * a.keys * (a.k_dim + a.v_dim) >= kWorthSharing)
      return run_parallel(count, work);
    for (int64_t i = 0; i < count; ++i) work(i);
  };
  const auto span_end = [&](int64_t span) { return std::min(a.keys, (span + 1) * kSpan); };
  if (all >= 2 * fm_threads() || spans < 2) {
    return share(all, [&](int64_t i) {
      Tile t = tile(i);
      Partial total = t.partial(), part = t.partial();
      total.clear();
      for (int64_t s = 0; s < spans; ++s) {
        t.span(s * kSpan, span_end(s), part);
        total.add(table, part, tile_rows(i));
      }
      t.finish(total, out);
    });
  }
  // Few rows and many keys: threads share the keys, some spans at a time, which bounds memory.
  const int64_t together = std::clamp<int64_t>(4 * fm_threads() / all, 1, spans);
  std::vector<Partial> totals, parts;
  for (int64_t i = 0; i < all; ++i) {
    totals.push_back(tile(i).partial());
    totals.back().clear();
    for (int64_t s = 0; s < together; ++s) parts.push_back(totals.back());
  }
  for (int64_t first = 0; first < spans; first += together) {
    const int64_t count = std::min(together, spans - first);
    share(all * count, [&](int64_t i) {
      const int64_t span = first + i % count;
      tile(i / count).span(span * kSpan, span_end(span), parts[i]);
    });
    for (int64_t i = 0; i < all * count; ++i)
      totals[i / count].add(table, parts[i], tile_rows(i / count));
  }
  for (int64_t i = 0; i < all; ++i) tile(i).finish(totals[i], out);
}

bool fits(const fm_attention& a) {
  const int64_t sizes[] = {a.batch, a.heads, a.queries, a.keys, a.k_dim, a.v_dim};
  if (!a.q || !a.k || !a.v || a.kv_heads < 1 || a.heads % a.kv_heads != 0) return false;
  if (std::any_of(std::begin(sizes), std::end(sizes), [](int64_t n) { return n < 1; }))
    return false;
  if (a.mask_kind < FM_NO_MASK || a.mask_kind > FM_ADDED_MASK) return false;
  if ((a.mask_kind >= FM_BOOLEAN_MASK) != (a.mask != nullptr)) return false;
  return a.mask_kind != FM_CAUSAL_MASK || a.keys >= a.queries;
}

}  // namespace
}  // namespace flashmoe

int fm_attend(const fm_attention* attention, float* out) {
  using namespace flashmoe;
  if (!attention || !out || !fits(*attention)) return FM_BAD_ARGUMENT;
  try {
    attend(*attention, out);
  } catch (const std::exception&) {
    return FM_NO_RESOURCES;
  }
  return FM_OK;
}
