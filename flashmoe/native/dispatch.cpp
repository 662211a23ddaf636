#include "dispatch.h"

#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>

#include "flashmoe_native.h"

namespace flashmoe {
namespace {

struct Choice {
  const Kernels* kernels;
  bool runs_here;
};

#if defined(__x86_64__)
// Some compilers' __builtin_cpu_supports does not know it.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// Best first.
const Choice* choices(int* count) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  static const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const Choice all[] = {
      {&kAvx512Kernels, avx512}, {&kAvx2Kernels, avx2}, {&kPortableKernels, true}};
#elif defined(__aarch64__)
  static const Choice all[] = {{&kNeonKernels, true}, {&kPortableKernels, true}};
#else
  static const Choice all[] = {{&kPortableKernels, true}};
#endif
  *count = int(sizeof all / sizeof all[0]);
  return all;
}

const Kernels* find(const char* name) {
  int count;
  const Choice* all = choices(&count);
  for (int i = 0; i < count; ++i)
    if (all[i].runs_here && (!name || strcmp(all[i].kernels->isa, name) == 0))
      return all[i].kernels;
  return nullptr;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{find(nullptr)};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(); }

}  // namespace flashmoe

const char* fm_isa(void) { return flashmoe::kernels().isa; }

int fm_use_isa(const char* name) {
  if (!name) return FM_BAD_ARGUMENT;
  const flashmoe::Kernels* found = flashmoe::find(name);
  if (!found) return FM_UNSUPPORTED;
  flashmoe::chosen().store(found);
  return FM_OK;
}
