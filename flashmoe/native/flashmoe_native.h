/* Matrix products and routed experts over packed weights, and attention, on the CPU.
 *
 * Arithmetic is float32: w = scale * q + bias rounded once, products accumulated in a fixed order.
 * A pair's result depends on its row of x and its slot's weights alone: not on the other pairs,
 * the slot's number, or how many threads run. It does depend on the instruction set.
 */
#ifndef FLASHMOE_NATIVE_H
#define FLASHMOE_NATIVE_H

#include <stdint.h>

#if defined(__GNUC__)
#define FM_EXPORT __attribute__((visibility("default")))
#else
#define FM_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Formats of weights, and dtypes of scales. */
enum {
  FM_F32 = 0,
  FM_BF16 = 1,
  FM_F16 = 2,
  FM_AFFINE = 3, /* MLX's: little-endian bit stream per row, w = scale * q + bias per group */
  FM_MXFP4 = 4   /* e2m1 codes, 8 in a uint32, one e8m0 scale for each group of 32 */
};

/* Results. */
enum {
  FM_OK = 0,
  FM_UNSUPPORTED = 1, /* a format, bits, group size, dtype or instruction set that is not covered */
  FM_BAD_ARGUMENT = 2, /* a null pointer, a size or index out of range, cols not whole groups */
  FM_NO_RESOURCES = 3 /* no memory or no thread */
};

/* Slots of equally shaped row-contiguous matrices. */
typedef struct {
  int64_t slots;
  const void* weight; /* slot 0: uint32 [rows, cols * bits / 32], or floats [rows, cols] */
  const void* scales; /* slot 0: [rows, cols / group_size]; NULL when not quantized */
  const void* biases; /* like scales; NULL unless affine */
  int64_t weight_slot_bytes; /* distance from one slot to the next */
  int64_t scales_slot_bytes;
  int64_t biases_slot_bytes;
  int64_t rows; /* outputs */
  int64_t cols; /* inputs */
  int32_t format;
  int32_t bits;        /* affine: 2, 3, 4, 5, 6, 8; mxfp4: 4; ignored for floats */
  int32_t group_size;  /* affine: 32, 64, 128; mxfp4: 32; ignored for floats */
  int32_t scale_dtype; /* affine: FM_F32, FM_BF16, FM_F16, biases too; otherwise ignored */
} fm_matrix;

/* y[p, :] = W[slots[p]] x[x_rows[p], :] for p in 0 .. n_pairs - 1.
 *
 * x float32 [*, cols], y float32 [n_pairs, rows], both row-contiguous. slots NULL: slot 0 for every
 * pair; x_rows NULL: row p for pair p. Calls from several threads run one after the other.
 */
FM_EXPORT int fm_matmul(const float* x, const int32_t* x_rows, const int32_t* slots,
                        int64_t n_pairs, const fm_matrix* w, float* y);

/* Activations: what a gate (or, without one, the input) becomes. */
enum {
  FM_SIGMOID = 0,   /* g * sigmoid(alpha * g); alpha 1 is SiLU */
  FM_GELU_TANH = 1, /* 0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) */
  FM_RELU2 = 2,     /* max(g, 0)^2 */
  FM_SITU = 3       /* alpha * tanh(g / alpha) * sigmoid(g) */
};

/* min(a(min(g, gate_max)), activated_max) * (b(clip(u, -up_max, up_max)) + up_shift), where
 * b(u) = up_bound * tanh(u / up_bound); without a gate min(a(min(u, gate_max)), activated_max).
 * INFINITY where nothing is limited. */
typedef struct {
  int32_t kind;
  float alpha;
  float gate_max;
  float activated_max;
  float up_max;
  float up_bound;
  float up_shift;
} fm_activation;

/* One vector for each slot, row-contiguous; data NULL means zeros. */
typedef struct {
  const void* data; /* [slots, n] */
  int32_t dtype;    /* FM_F32, FM_BF16, FM_F16 */
} fm_vectors;

/* Slots of routed experts. */
typedef struct {
  fm_matrix gate; /* weight NULL: no gate */
  fm_matrix up;
  fm_matrix down;
  fm_vectors gate_bias;
  fm_vectors up_bias;
  fm_vectors down_bias;
  fm_activation activation;
} fm_experts;

/* y[t, j, :] = expert slots[t, j] applied to x[t, :]: down(activation(gate x, up x)).
 *
 * x float32 [n_tokens, up.cols], slots [n_tokens, top_k], y float32 [n_tokens, top_k, down.rows].
 * Each row has the bits that fm_matmul gives it, whatever else is in the call. Takes 8 MB of
 * memory at most, or what one pair needs, beside what lists of pairs take.
 */
FM_EXPORT int fm_expert_forward(const float* x, const int32_t* slots, int64_t n_tokens,
                                int64_t top_k, const fm_experts* experts, float* y);

/* Masks. */
enum {
  FM_NO_MASK = 0,
  FM_CAUSAL_MASK = 1,  /* the last query sees every key, each one before it one key less */
  FM_BOOLEAN_MASK = 2, /* one byte, not 0 where a query sees a key */
  FM_ADDED_MASK = 3    /* floats, added to the scores; -FLT_MAX and below hides a key */
};

/* softmax(scale q k^T, masked) v. Strides are in elements, in the order of the axes named. */
typedef struct {
  const float* q;    /* [batch, heads, queries, k_dim] */
  const float* k;    /* [batch, kv_heads, keys, k_dim]; heads / kv_heads heads share one */
  const float* v;    /* [batch, kv_heads, keys, v_dim] */
  const void* mask;  /* [batch, heads, queries, keys]; NULL for FM_NO_MASK and FM_CAUSAL_MASK */
  const float* sinks; /* [heads], a score without a value; NULL: none */
  int64_t q_strides[4];
  int64_t k_strides[4];
  int64_t v_strides[4];
  int64_t mask_strides[4]; /* 0 along an axis that the mask does not have */
  int64_t batch, heads, kv_heads, queries, keys, k_dim, v_dim;
  float scale;
  int32_t mask_kind;
} fm_attention;

/* out [batch, queries, heads, v_dim] float32, row-contiguous.
 *
 * Scores are never held for more than a block of keys and a few rows. A query's result depends on
 * the query, its mask, keys and values alone. A query that sees no key gets the mean of the values
 * that are hidden from it by less than -INFINITY, which is what MLX's function gives. At least as
 * many keys as queries for FM_CAUSAL_MASK.
 */
FM_EXPORT int fm_attend(const fm_attention* attention, float* out);

/* The instruction set in use, the best that runs here unless chosen otherwise. */
FM_EXPORT const char* fm_isa(void);

/* Choose "avx512", "avx2", "neon" or "portable"; FM_UNSUPPORTED where it is not there. */
FM_EXPORT int fm_use_isa(const char* name);

/* Threads that share the work, the caller's included; as many as this process may use cores. */
FM_EXPORT int fm_threads(void);

/* Take n threads from the next call on; n < 1 goes back to one per usable core. */
FM_EXPORT void fm_set_threads(int n);

/* Changes whenever this interface does. */
FM_EXPORT const char* fm_version(void);

#ifdef __cplusplus
}
#endif
#endif
