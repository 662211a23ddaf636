#include "simd_avx512.h"

#include "kernels.inl"

namespace flashmoe {
const Kernels kAvx512Kernels = make_kernels();
}
