#include "simd_avx2.h"

#include "kernels.inl"

namespace flashmoe {
const Kernels kAvx2Kernels = make_kernels();
}
