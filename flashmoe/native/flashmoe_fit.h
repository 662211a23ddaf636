/* Fitting affine codes to weights: the quantizer's part of the interface. */
#ifndef FLASHMOE_FIT_H
#define FLASHMOE_FIT_H

#include <stdint.h>

#include "flashmoe_native.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How groups are fitted. From each start, a share of the group's range, codes and parameters are
 * found in turns, so that the sum of |w - scale * code - bias|^2.5 falls; then the scale is
 * stretched until the group has its variance again, and both are rounded to scale_dtype. */
typedef struct {
  int32_t bits;        /* 2, 3, 4, 5, 6, 8 */
  int32_t group_size;  /* 32, 64, 128 */
  int32_t scale_dtype; /* FM_F32, FM_BF16, FM_F16 */
  int32_t rounds;
  int32_t n_starts;
  const float* starts;
  float least_residual; /* what is added to a residual, in steps of the range over all codes */
} fm_fit;

/* Take the best of each group's candidates, (scales[i], biases[i]) as they are given being one.
 *
 * w float32 [n_groups, group_size], scales and biases float32 [n_groups], overwritten; codes as
 * FM_AFFINE has them, [n_groups, group_size * bits / 32]. A group depends on nothing but itself and
 * the instruction set.
 */
FM_EXPORT int fm_fit_groups(const float* w, int64_t n_groups, const fm_fit* fit, uint32_t* codes,
                            float* scales, float* biases);

#ifdef __cplusplus
}
#endif
#endif
