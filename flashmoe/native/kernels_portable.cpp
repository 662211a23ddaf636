#include "simd_portable.h"

#include "kernels.inl"

namespace flashmoe {
const Kernels kPortableKernels = make_kernels();
}
