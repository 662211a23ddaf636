#include "simd_neon.h"

#include "kernels.inl"

namespace flashmoe {
const Kernels kNeonKernels = make_kernels();
}
