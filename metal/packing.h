// How rows of weights are packed, and the product of one unit of a row.
//
// A row is a string of bits, value i at bit i * Bits, cut into 32-bit words. A lane takes one unit
// at a time: 32 packed values, which is `Bits` words and never more than one group, or 8 floats.

#pragma once

#include <metal_stdlib>

using namespace metal;

namespace flashmoe {

constant constexpr int AFFINE = 0;
constant constexpr int MXFP4 = 1;
constant constexpr int FLOAT32 = 2;
constant constexpr int FLOAT16 = 3;
constant constexpr int BFLOAT16 = 4;

// A block of values takes whole words, whatever their bits.
constant constexpr int BLOCK = 32;

// One load where the count allows: units of 4n words start on 16 bytes, of 2n words on 8.
template <int Words>
METAL_FUNC void load_words(const device uint32_t* from, thread uint32_t* words) {
  if (Words % 4 == 0) {
#pragma unroll
    for (int i = 0; i < Words / 4; ++i) {
      const uint4 four = reinterpret_cast<const device uint4*>(from)[i];
      words[4 * i] = four.x;
      words[4 * i + 1] = four.y;
      words[4 * i + 2] = four.z;
      words[4 * i + 3] = four.w;
    }
  } else if (Words % 2 == 0) {
#pragma unroll
    for (int i = 0; i < Words / 2; ++i) {
      const uint2 two = reinterpret_cast<const device uint2*>(from)[i];
      words[2 * i] = two.x;
      words[2 * i + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < Words; ++i) words[i] = from[i];
  }
}

// Value i of a block lies in one word or straddles two. In one word it is masked and not shifted:
// it then counts 2^shift times, and the x it meets was multiplied by 2^-shift beforehand.
template <int Bits>
METAL_FUNC uint32_t shift_of(int i) {
  const int shift = i * Bits % 32;
  return shift + Bits <= 32 ? shift : 0;
}

template <int Bits>
METAL_FUNC float code_of(const thread uint32_t* words, int i) {
  const uint32_t mask = (1u << Bits) - 1;
  const int word = i * Bits / 32, shift = i * Bits % 32;
  if (shift + Bits <= 32) return float(words[word] & (mask << shift));
  return float(((words[word] >> shift) | (words[word + 1] << (32 - shift))) & mask);
}

// Twice the value of an e2m1 code, which makes it an integer: 0 1 2 3 4 6 8 12, then negated.
METAL_FUNC float doubled_e2m1(uint32_t code) {
  const float magnitude = float((0xC8643210u >> ((code & 7u) * 4u)) & 15u);
  return code & 8u ? -magnitude : magnitude;
}

// Half of the power of two that an e8m0 scale stands for.
METAL_FUNC float halved_e8m0(uint32_t scale) {
  return 0.5f * as_type<float>(scale == 0u ? 0x00400000u : scale << 23);
}

// `n_slots` matrices [rows, cols], one after the other. What a format does not have (scales and
// biases of floats, biases of mxfp4, `bias` without HasBias) is never read.
template <int Format, int Bits, int Group, bool HasBias, typename S, typename B>
struct Matrix {
  const device uint32_t* weight;
  const device S* scales;
  const device S* biases;
  const device B* bias;

  enum : int {
    PACKED = Format == AFFINE || Format == MXFP4,
    VALUES = PACKED ? BLOCK : 8,
    WORDS = VALUES * Bits / 32,
    CODE_BITS = Format == AFFINE ? Bits : 1,
  };

  // What x in this column of a block is multiplied by before it meets the codes.
  static METAL_FUNC float prescale(uint column) {
    if (Format != AFFINE) return 1.0f;
    return as_type<float>((127u - shift_of<CODE_BITS>(int(column))) << 23);
  }

  // The sum of a unit of x, undoing `prescale`.
  static METAL_FUNC float sum(const thread float* x) {
    if (Format != AFFINE) return 0.0f;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) total = fma(x[i], float(1u << shift_of<CODE_BITS>(i)), total);
    return total;
  }

  // The matrix of one slot. Banks exceed 4 GB, slots do not: 64 bits to get there, 32 within.
  METAL_FUNC Matrix in_slot(uint64_t slot, uint rows, uint cols) const {
    const uint64_t row = slot * rows, groups = row * (cols / Group);
    return {weight + row * (cols / VALUES * WORDS), scales + groups, biases + groups, bias + row};
  }

  // Unit `unit` of row `row` times x.
  METAL_FUNC float product(
      uint row, uint cols, uint unit, const thread float* x, float x_sum) const {
    uint32_t words[WORDS];
    load_words<WORDS>(weight + row * (cols / VALUES * WORDS) + unit * WORDS, words);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) total = fma(value(words, i), x[i], total);
    if (!PACKED) return total;
    const uint group = row * (cols / Group) + unit * BLOCK / Group;
    if (Format == MXFP4) return halved_e8m0(uint32_t(scales[group])) * total;
    return fma(float(scales[group]), total, float(biases[group]) * x_sum);
  }

  METAL_FUNC float bias_of(uint row) const { return HasBias ? float(bias[row]) : 0.0f; }

 private:
  static METAL_FUNC float value(const thread uint32_t* words, int i) {
    if (Format == AFFINE) return code_of<CODE_BITS>(words, i);
    if (Format == MXFP4) return doubled_e2m1(words[i / 8] >> (i % 8 * 4));
    if (Format == FLOAT32) return as_type<float>(words[i]);
    const uint32_t word = words[i / 2];
    if (Format == BFLOAT16) return as_type<float>(i % 2 ? word & 0xFFFF0000u : word << 16);
    return float(as_type<half>(uint16_t(i % 2 ? word >> 16 : word & 0xFFFFu)));
  }
};

template <int Format, int Bits, int Group, bool HasBias, typename S, typename B>
METAL_FUNC Matrix<Format, Bits, Group, HasBias, S, B> make_matrix(
    const device uint32_t* weight,
    const device S* scales,
    const device S* biases,
    const device B* bias) {
  return {weight, scales, biases, bias};
}

}  // namespace flashmoe
