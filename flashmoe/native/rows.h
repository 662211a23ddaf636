// One slot's product with its pairs, over a range of rows.
#ifndef FLASHMOE_ROWS_H
#define FLASHMOE_ROWS_H

#include <stdint.h>

#include "flashmoe_native.h"
#include "kernels.h"

namespace flashmoe {

// The pairs of one slot: y[pairs[i]] = W x[i] for i < count.
struct Group {
  int64_t slot;
  int64_t count;
  const float* const* x;  // [count] rows of cols floats
  float* const* y;        // [count] rows of w.rows floats
};

const Codec& codec_of(const Kernels& kernels, const fm_matrix& w);

// Computes rows begin .. end - 1.
void multiply_rows(const Kernels& kernels, const fm_matrix& w, const Group& group, int64_t begin,
                   int64_t end);

}  // namespace flashmoe
#endif
