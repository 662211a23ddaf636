// SHA-256 of N streams in step. Isa brings the instructions:
//   Words                                    four 32-bit words
//   load(words), load_big_endian(bytes), add(a, b)
//   begin(state, halves), end(halves, state)  the eight words, as the instructions want them
//   four_rounds(halves, words)
//   following(w0, w1, w2, w3)                the words of the message after these
#include <stdint.h>

namespace flashmoe {
namespace {

alignas(64) constexpr uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

template <class Isa, int N>
void sha256_blocks(uint32_t* const* states, const uint8_t* const* data, int64_t n_blocks) {
  using Words = typename Isa::Words;
  Words halves[N][2], before[N][2], w[N][4];
  for (int lane = 0; lane < N; ++lane) Isa::begin(states[lane], halves[lane]);
  for (int64_t block = 0; block < n_blocks; ++block) {
    for (int lane = 0; lane < N; ++lane) {
      for (int half = 0; half < 2; ++half) before[lane][half] = halves[lane][half];
      for (int i = 0; i < 4; ++i)
        w[lane][i] = Isa::load_big_endian(data[lane] + 64 * block + 16 * i);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const Words constants = Isa::load(kRounds + 4 * i);
#pragma GCC unroll 2
      for (int lane = 0; lane < N; ++lane) {
        Words* const own = w[lane];
        Isa::four_rounds(halves[lane], Isa::add(own[i % 4], constants));
        if (i < 12)
          own[i % 4] =
              Isa::following(own[i % 4], own[(i + 1) % 4], own[(i + 2) % 4], own[(i + 3) % 4]);
      }
    }
    for (int lane = 0; lane < N; ++lane)
      for (int half = 0; half < 2; ++half)
        halves[lane][half] = Isa::add(halves[lane][half], before[lane][half]);
  }
  for (int lane = 0; lane < N; ++lane) Isa::end(halves[lane], states[lane]);
}

template <class Isa>
void sha256(uint32_t* state, const uint8_t* data, int64_t n_blocks) {
  sha256_blocks<Isa, 1>(&state, &data, n_blocks);
}

template <class Isa>
void sha256_of_two(uint32_t* const states[2], const uint8_t* const data[2], int64_t n_blocks) {
  sha256_blocks<Isa, 2>(states, data, n_blocks);
}

}  // namespace
}  // namespace flashmoe
