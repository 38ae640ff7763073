// Products with weights whose output axis is contiguous ([H, J] and [I, H]: gpt-oss, Aria), read in place.
//
// A strip of neighbouring columns is walked down a few rows at a time; its sums stay in a buffer in the cache. Every
// sum adds the rows in ascending order whatever the strip, so a token's bits depend on nothing else.
#pragma once

#include "dot.h"

namespace {

// sums[n][..] += x[n][k] * w[k][..] for one row (of bfloat16 pairs: two rows, of which the second may be absent).
template <class V, class D, int N, int C>
inline __attribute__((always_inline)) void column_step(const D* w, int64_t, bool, const float* x, int64_t x_stride,
                                                       typename V::Reg (&sum)[N][2 * C]) {
  typename V::Reg weight[2 * C];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
    weight[2 * c] = V::first(w + 2 * V::kWidth * c);
    weight[2 * c + 1] = V::second(w + 2 * V::kWidth * c);
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
    const auto v = V::keep(V::set(x[n * x_stride]));
#pragma GCC unroll 16
    for (int c = 0; c < 2 * C; ++c) sum[n][c] = V::fma(v, weight[c], sum[n][c]);
  }
}

template <class V, class D, int N, int C>
inline __attribute__((always_inline)) void column_step(const D* w, int64_t stride, bool alone, const Bf16* x,
                                                       int64_t x_stride, typename V::Reg (&sum)[N][2 * C]) {
  typename V::Pairs weight[2 * C];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c)
    V::zip_columns(w + 2 * V::kWidth * c, alone ? nullptr : w + stride + 2 * V::kWidth * c, weight[2 * c],
                   weight[2 * c + 1]);
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
    const auto v = V::keep_pairs(V::set_pair(x + n * x_stride));
#pragma GCC unroll 16
    for (int c = 0; c < 2 * C; ++c) sum[n][c] = V::dot(sum[n][c], weight[c], v);
  }
}

// sums[n][..] += x[n][k] * w[k][..] over `rows` rows and 2 * pairs(N) vectors of columns.
template <class V, class D, int N, class X>
void column_block(const D* w, int64_t stride, int64_t rows, const X* x, int64_t x_stride, float* sums, bool first,
                  const D* ahead, int64_t ahead_stride) {
  constexpr int W = V::kWidth, C = V::pairs(N), kRows = kPaired<V> ? 2 : 1;
  typename V::Reg sum[N][2 * C];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
    for (int c = 0; c < 2 * C; ++c) sum[n][c] = first ? V::zero() : V::load(sums + n * kStripStride + c * W);
  for (int64_t k = 0; k < rows; k += kRows, w += kRows * stride, ahead += kRows * ahead_stride) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int byte = 0; byte < static_cast<int>(2 * C * W * sizeof(D)); byte += kCacheLine)
        _mm_prefetch(reinterpret_cast<const char*>(ahead + r * ahead_stride) + byte, _MM_HINT_T0);
    column_step<V, D, N, C>(w, stride, k + 1 >= rows, x + k, x_stride, sum);
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
    for (int c = 0; c < 2 * C; ++c) V::store(sums + n * kStripStride + c * W, sum[n][c]);
}

template <class V, class D, int N = 1, class X>
inline void column_block_of(int tokens, const D* w, int64_t stride, int64_t rows, const X* x, int64_t x_stride,
                            float* sums, bool first, const D* ahead, int64_t ahead_stride) {
  if (tokens == N) return column_block<V, D, N>(w, stride, rows, x, x_stride, sums, first, ahead, ahead_stride);
  if constexpr (N < V::kMaxTokens)
    column_block_of<V, D, N + 1>(tokens, w, stride, rows, x, x_stride, sums, first, ahead, ahead_stride);
}

// sums[s][0..columns) = x[s] . w[:, 0..columns) for all `tokens` rows of x; `next` is fetched at the end. A row of
// `sums` has kStripStride floats.
template <class V, class D, class X>
void column_strip(const D* w, int64_t stride, int64_t size, int64_t columns, const X* x, int64_t x_stride,
                  int tokens, float* sums, const D* next) {
  constexpr int W = V::kWidth, kWidest = 2 * W * V::pairs(1), kMostRows = 32;
  const int64_t together = tokens <= V::kMaxTokens ? 16 : kMostRows;
  const int blocks = static_cast<int>(ceil_div(tokens, V::kMaxTokens));
  const D* idle = reinterpret_cast<const D*>(x);
  for (int64_t begin = 0; begin < size; begin += together) {
    const int64_t rows = min64(together, size - begin);
    const D* following = begin + together < size ? w + (begin + together) * stride : next;
    for (int block = 0; block < blocks; ++block) {
      const int start = tokens * block / blocks, count = tokens * (block + 1) / blocks - start;
      const int64_t wide = 2 * W * V::pairs(count);
      for (int64_t c = 0; c < columns; c += wide) {
        const D* from = w + begin * stride + c;
        int64_t from_stride = stride;
        D padded[kMostRows * kWidest];
        if (columns - c < wide) {  // the last columns: their neighbours may lie outside the tensor
          memset(padded, 0, sizeof(padded));
          for (int64_t k = 0; k < rows; ++k) memcpy(padded + k * wide, from + k * stride, sizeof(D) * (columns - c));
          from = padded;
          from_stride = wide;
        }
        const bool fetch = c / wide % blocks == block;
        column_block_of<V, D>(count, from, from_stride, rows, x + start * x_stride + begin, x_stride,
                              sums + start * kStripStride + c, begin == 0, fetch ? following + c : idle,
                              fetch ? stride : 0);
      }
    }
  }
  if (!kSplit<D>) return;
  for (int s = 0; s < tokens; ++s)  // columns back to their places
    for (int64_t c = 0; c < columns; c += 2 * W) {
      float* at = sums + s * kStripStride + c;
      auto a = V::load(at), b = V::load(at + W);
      V::order_columns(a, b);
      V::store(at, a);
      V::store(at + W, b);
    }
}

}  // namespace
