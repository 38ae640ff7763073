// Products with quantised weights: codes of one byte or half a byte, widened to float32 in registers as they are read.
//
// A weight is scale * code, or scale * (code - zero), in float32; a sum adds weight * input in the order of the plain
// kernel. So a token's bits depend neither on the other tokens nor on how the work was cut.
#pragma once

#include "dot.h"

namespace {

constexpr int kCodes = 32;  // codes that are widened together
template <int kind>
constexpr int kStepBytes = kind == kInt8 || kind == kInt8Row ? 32 : 16;

// Sixteen numbers that the codes of half a byte stand for: their values, less 8 where there are no zero points, or their
// e2m1 numbers.
template <int kind>
inline const float* nibble_table() {
  alignas(64) static const float plain[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  alignas(64) static const float centred[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  alignas(64) static const float e2m1[16] = {0,     0.5f,  1,  1.5f,  2,  3,  4,  6,
                                          -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
  return kind == kInt4 ? centred : kind == kE2m1 ? e2m1 : plain;
}

// A stretch of memory that a thread reads, and where it goes on.
struct Stretch {
  const uint8_t *at, *end, *then;

  const uint8_t* ahead(int64_t bytes) const { return at + bytes < end ? at + bytes : then + (at + bytes - end); }
};

// Rows of one expert's matrix, and their scales and zero points as floats, or as stored (`codes_bf16.h`).
struct CodeRows {
  const uint8_t* at;
  int64_t stride;  // bytes
  const float *scale, *zero;
  int64_t groups;     // floats from a row's scales to those of the next
  int64_t per_group;  // steps of 32 codes that share a scale
  const uint8_t *end, *then;  // where the bytes end that this thread reads in a row, and where it goes on
  Stretch stored;             // the scales as stored, or null
  int64_t stored_stride, to_zero;  // bytes from a row's stored scales to those of the next, and to its zero points

  CodeRows from(int r) const {
    CodeRows some = *this;
    some.at += r * stride;
    if (stored.at != nullptr) {
      some.stored.at += r * stored_stride;
      return some;
    }
    some.scale += r * groups;
    some.zero += r * groups;
    return some;
  }
  CodeRows alone(int r) const {  // a row that stands for any number of rows
    CodeRows one = from(r);
    one.stride = one.groups = one.stored_stride = 0;
    return one;
  }
};

// How many rows ahead memory is fetched while `rows` rows are computed: a multiple of them, and `bytes` or more.
inline int64_t rows_ahead(const CodeRows& w, int rows, int64_t bytes = 8192) {
  return w.stride == 0 ? 0 : ceil_div(bytes, rows * w.stride) * rows;
}
inline const uint8_t* ahead_of(const CodeRows& w, int rows) {
  return Stretch{w.at, w.end, w.then}.ahead(rows_ahead(w, rows) * w.stride);
}
// Fetches the lines that follow `step` times R lines from `ahead` on. Rows that are read side by side are fetched one
// after the other: memory is slower where it is asked for several streams at a time.
template <int R>
inline __attribute__((always_inline)) void fetch_lines(const uint8_t* ahead, int64_t step) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    _mm_prefetch(reinterpret_cast<const char*>(ahead) + (step * R + r) * kCacheLine, _MM_HINT_T0);
}

// 32 weights of a row, from the codes at `from` in the group `group`.
template <class V, int kind>
inline __attribute__((always_inline)) void widen_codes(const uint8_t* from, const CodeRows& w, int64_t group, int r,
                                                       typename V::Reg* to) {
  constexpr int kRegs = kCodes / V::kWidth;
  if (kind == kInt8Row) return V::widen_bytes(from, to);  // its scale is the same for all: it waits for the sum
  const auto scale = V::set(w.scale[r * w.groups + group]);
  if (kind == kInt8) {
    V::widen_bytes(from, to);
#pragma GCC unroll 16
    for (int i = 0; i < kRegs; ++i) to[i] = V::mul(to[i], scale);
    return;
  }
  // Sixteen numbers are scaled, not thirty-two weights: the same products, found in a table.
  typename V::Reg table[16 / V::kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < 16 / V::kWidth; ++i) {
    table[i] = V::load(nibble_table<kind>() + i * V::kWidth);
    if (kind == kInt4Zero) table[i] = V::sub(table[i], V::set(w.zero[r * w.groups + group]));
    table[i] = V::mul(table[i], scale);
  }
  V::widen_nibbles(from, table, to);
}

// One step of 32 codes of R rows for N inputs.
template <class V, int kind, int R, int N>
inline __attribute__((always_inline)) void code_step(const uint8_t* from, int64_t stride, const CodeRows& w,
                                                     int64_t group, const float* x, typename V::Reg (&sum)[R][N]) {
  constexpr int W = V::kWidth, kStep = 2 * W, kRegs = kCodes / W;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    typename V::Reg weight[kRegs];
    widen_codes<V, kind>(from + r * stride, w, group, r, weight);
#pragma GCC unroll 16
    for (int i = 0; i < kRegs; ++i)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n)
        sum[r][n] = V::fma(weight[i], V::load(x + (i / 2 * N + n) * kStep + i % 2 * W), sum[r][n]);
  }
}

// tile[n][r] = x[n] . w[r] for R rows and N inputs of `size` values.
template <class V, int kind, int R, int N>
inline void code_block(const CodeRows& w, int64_t size, const float* x, float* tile, const uint8_t* ahead) {
  constexpr int kBytes = kStepBytes<kind>;
  constexpr bool kWhole = kBytes == 16;  // packed codes fill whole steps
  typename V::Reg sum[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[r][n] = V::zero();
  const int64_t steps = kWhole ? ceil_div(size, kCodes) : size / kCodes;
  int64_t group = 0, left = w.per_group;
  for (int64_t s = 0; s < steps; ++s) {
    if (s * kBytes % kCacheLine == 0) fetch_lines<R>(ahead, s * kBytes / kCacheLine);
    code_step<V, kind, R, N>(w.at + s * kBytes, w.stride, w, group, x + s * N * kCodes, sum);
    if (--left == 0) {
      left = w.per_group;
      ++group;
    }
  }
  if (!kWhole && steps * kCodes < size) {  // a row of bytes may end within a step
    uint8_t rest[R * kCodes] = {};
    for (int r = 0; r < R; ++r) memcpy(rest + r * kCodes, w.at + r * w.stride + steps * kCodes, size - steps * kCodes);
    code_step<V, kind, R, N>(rest, kCodes, w, group, x + steps * N * kCodes, sum);
  }
  store_sums<V, R, N>(sum, tile);
}

// Up to 32 rows, in blocks of R: block(rows, place).
template <int R, class Block>
inline void for_row_blocks(const CodeRows& w, int rows, const Block& block) {
  if (rows < R) {  // fewer rows than a block has: each one alone, R times over
    for (int r = 0; r < rows; ++r) block(w.alone(r), r);
    return;
  }
  for (int top = 0; top < rows; top += R) {
    const int r = top + R <= rows ? top : rows - R;  // the last block may step back
    block(w.from(r), r);
  }
}

template <class V, int kind, int N = 1>
inline void code_panel_of(int tokens, const CodeRows& w, int rows, int64_t size, const float* x, float* tile) {
  if (tokens == N) {
    constexpr int R = V::rows(N);
    return for_row_blocks<R>(w, rows, [&](const CodeRows& some, int r) {
      code_block<V, kind, R, N>(some, size, x, tile + r, ahead_of(some, R));
    });
  }
  if constexpr (N < V::kMaxTokens) code_panel_of<V, kind, N + 1>(tokens, w, rows, size, x, tile);
}

// Widens up to 32 rows into floats, `stride` from row to row: the weights that `code_step` has in its registers.
template <class V, int kind>
void widen_panel(const CodeRows& w, int rows, int64_t size, float* to, int64_t stride) {
  constexpr int kBytes = kStepBytes<kind>, kRegs = kCodes / V::kWidth;
  for (int r = 0; r < rows; ++r)
    for (int64_t s = 0; s * kCodes < size; ++s) {
      const uint8_t* from = w.at + r * w.stride + s * kBytes;
      uint8_t rest[kCodes] = {};
      if (kBytes == kCodes && (s + 1) * kCodes > size) {  // a row of bytes may end within a step
        memcpy(rest, from, size - s * kCodes);
        from = rest;
      }
      typename V::Reg weight[kRegs];
      widen_codes<V, kind>(from, w, s / w.per_group, r, weight);
      for (int i = 0; i < kRegs; ++i) V::store(to + r * stride + s * kCodes + i * V::kWidth, weight[i]);
    }
}

// How weights of a kind are multiplied with inputs: the products themselves, rows widened for several blocks of tokens,
// and the products with those. Both ways make the same bits.
template <class V, int kind>
struct Codes {
  using Layout = Steps<V>;
  using Input = typename Layout::Input;
  using Wide = float;
  static constexpr bool kBytes = false;       // inputs become bytes
  static constexpr bool repeats(int64_t, bool) { return false; }  // a group's scale for each 32 codes
  static constexpr bool reads_scales(int32_t, int64_t) { return false; }  // as stored: of this type and group

  static int64_t width(int64_t size) { return Layout::width(size); }
  static int64_t wide_stride(int64_t size) { return round_up(size, kCodes); }
  static void widen(const CodeRows& w, int rows, int64_t size, Wide* to) {
    widen_panel<V, kind>(w, rows, size, to, wide_stride(size));
  }
  // tile[n][r] = x[n] . w[r], without the scale of a row where that is the same for all of it.
  static void dot(int tokens, const CodeRows& w, int rows, int64_t size, const Input* x, float* tile) {
    code_panel_of<V, kind>(tokens, w, rows, size, x, tile);
  }
  static void dot_wide(int tokens, const Wide* wide, const CodeRows&, int rows, int64_t size, const Input* x,
                       float* tile) {
    dot_panel_of<V, float>(tokens, wide, wide_stride(size), rows, size, x, tile, {wide, 0, 1, 0});
  }
};

}  // namespace
