// The C interface of what stands around the experts: products with few rows, norms, rotary positions, and attention of
// single tokens over a paged cache.
//
// Shape letters: T tokens, S sequences, N outputs, H depth or width of a row, I intermediate, Hq and Hkv heads, D width of
// queries and keys, Dv of values, R rotated part of D, B tokens of a block, M blocks of a sequence.
#pragma once

#include "api.h"

extern "C" {

// Fields are mirrored by `dense.py`. Strides count elements. Every last axis is contiguous.

// out = x w^T + bias, or activation(gate) * up of such a product whose first half of rows is the gate.
struct MoetorLinear {
  const void* x;       // [T, H]
  const void* weight;  // [N, H], or [2 I, H]
  const void* bias;    // [N] or null
  void* out;           // [T, N], or [T, I]; contiguous
  void* packed;        // scratch: T rows of H rounded up to 32 floats
  int64_t tokens, outputs, depth, x_stride, weight_stride;
  int32_t dtype, isa, threads;
  int32_t activation;  // an ActivationName, or -1 for a plain product
};

// total = x + residual, rounded; out = its RMSNorm. Rows are contiguous.
struct MoetorNorm {
  const void* x;
  const void* residual;  // null for none; then `total` is not written
  const void* weight;    // [H] or null
  void* out;
  void* total;
  int64_t rows, width;
  int32_t dtype, isa, threads;
  float eps, offset;
};

// Queries and keys normed head by head where there is a weight, and turned.
struct MoetorRotate {
  const void* query;  // [T, Hq, D]
  const void* key;    // [T, Hkv, D]
  const void* value;  // [T, Hkv, Dv]
  const void* cos;    // [T, ...], in the dtype of `table_dtype`
  const void* sin;
  const void* query_weight;  // [D] or null
  const void* key_weight;
  const int64_t* slots;  // [T], block * B + offset, or negative for none; null: keys are returned
  void* query_out;       // [T, Hq, D], contiguous
  void* key_out;         // [T, Hkv, D], contiguous; or the cache's keys
  void* value_out;       // the cache's values
  int64_t tokens, heads, kv_heads, width, value_width, rotated;
  int64_t query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride;
  int64_t table_stride, block_size, key_block_stride, key_slot_stride, key_cache_head_stride;
  int64_t value_block_stride, value_slot_stride, value_cache_head_stride;
  int32_t dtype, table_dtype, isa, threads;
  int32_t pairs, table;  // table: 0 halves, 1 once, 2 twice (see RotaryForm)
  int32_t norms;         // whether there are norms, with or without weights
  float eps, offset;
};

// One query each of S sequences, over the sequence's keys [first seen, length).
struct MoetorAttention {
  const void* query;         // [S, Hq, D]
  const void* keys;          // [blocks, B, Hkv, D]
  const void* values;        // [blocks, B, Hkv, Dv]
  void* out;                 // [S, Hq, Dv], contiguous
  const int32_t* table;      // [S, M]
  const int32_t* lens;       // [S], keys with the query's own
  const float* sinks;        // [Hq] or null
  int64_t sequences, heads, kv_heads, width, value_width, block_size, table_stride;
  int64_t query_stride, query_head_stride;
  int64_t key_block_stride, key_slot_stride, key_head_stride;
  int64_t value_block_stride, value_slot_stride, value_head_stride;
  int64_t window, chunk;     // 0 for none
  int32_t dtype, isa, threads;
  float scale, softcap;      // softcap 0: none
};

// Each returns a Status.
int moetor_linear(const MoetorLinear* args);
int moetor_norm(const MoetorNorm* args);
int moetor_rotate(const MoetorRotate* args);
int moetor_attention(const MoetorAttention* args);
}

// Runs `work(data)` in a team of `threads`.
using StartTeam = void (*)(void (*work)(void*), void* data, int threads);

// The same for one instruction set: one translation unit each.
struct DenseEntries {
  int (*linear)(const MoetorLinear&, StartTeam);
  int (*norm)(const MoetorNorm&, StartTeam);
  int (*rotate)(const MoetorRotate&, StartTeam);
  int (*attention)(const MoetorAttention&, StartTeam);
};
extern "C" {
extern const DenseEntries moetor_dense_avx2, moetor_dense_avx512, moetor_dense_avx512_bf16;
}
