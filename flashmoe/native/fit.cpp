// fm_fit_groups: groups of weights shared out over threads.
#include "flashmoe_fit.h"

#include <algorithm>
#include <exception>

#include "dispatch.h"
#include "pool.h"

namespace flashmoe {
namespace {

// Groups that a thread takes at a time.
constexpr int64_t kShare = 128;

bool is_covered(const fm_fit& fit) {
  const int bits[] = {2, 3, 4, 5, 6, 8}, groups[] = {32, 64, 128}, dtypes[] = {FM_F32, FM_BF16,
                                                                               FM_F16};
  const auto has = [](const auto& all, int one) {
    return std::find(std::begin(all), std::end(all), one) != std::end(all);
  };
  return has(bits, fit.bits) && has(groups, fit.group_size) && has(dtypes, fit.scale_dtype);
}

}  // namespace
}  // namespace flashmoe

int fm_fit_groups(const float* w, int64_t n_groups, const fm_fit* fit, uint32_t* codes,
                  float* scales, float* biases) {
  using namespace flashmoe;
  if (!w || !fit || !codes || !scales || !biases || n_groups < 0) return FM_BAD_ARGUMENT;
  if (fit->rounds < 0 || fit->n_starts < 0 || (fit->n_starts && !fit->starts))
    return FM_BAD_ARGUMENT;
  if (!is_covered(*fit)) return FM_UNSUPPORTED;
  const int64_t words = fit->group_size * fit->bits / 32;
  const auto& table = kernels();
  try {
    run_parallel((n_groups + kShare - 1) / kShare, [&](int64_t share) {
      const int64_t end = std::min(n_groups, (share + 1) * kShare);
      for (int64_t i = share * kShare; i < end; ++i)
        table.fit_group(w + i * fit->group_size, *fit, codes + i * words, scales + i, biases + i);
    });
  } catch (const std::exception&) {
    return FM_NO_RESOURCES;
  }
  return FM_OK;
}
