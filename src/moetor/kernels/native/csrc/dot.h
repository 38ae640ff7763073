// Products with weights whose reduction axis is contiguous ([J, H] and [H, I]), read in place.
//
// A block is a few weight rows times up to kMaxTokens inputs. Every sum is one vector that runs along the reduction
// axis in the same order whatever the block, and is added across its lanes by the same tree: a token's bits therefore
// depend neither on the other tokens nor on how the work was cut.
#pragma once

#include "rows.h"

namespace {

constexpr int kPanel = 32;           // rows of one panel: the unit of output
constexpr int kInputBytes = 24576;   // inputs of a block that stay in the first-level cache: half of it
constexpr int kCacheLine = 64;

// What to fetch while a panel is computed. Token block `phase` of `period` fetches its share of the panel at `next`;
// with `chain` (a single token block) each row block fetches the one after it instead, and the last one `next`.
template <class D>
struct Ahead {
  const D* next;
  int64_t next_stride;
  int period, phase;
  bool chain;
};

template <class V, class D, int R, int N>
inline void dot_block(const D* w, int64_t stride, const float* const* x, int64_t begin, int64_t steps, float* sums,
                      bool first, float* tile, const D* ahead, int64_t ahead_stride) {
  constexpr int W = V::kWidth, kStep = 2 * W;
  typename V::Reg sum[R][N];
  const float* in[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) in[n] = x[n] + begin;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[r][n] = first ? V::zero() : V::load(sums + (r * N + n) * W);
  for (int64_t s = 0; s < steps; ++s, w += kStep, ahead += kStep) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int byte = 0; byte < static_cast<int>(kStep * sizeof(D)); byte += kCacheLine)
        _mm_prefetch(reinterpret_cast<const char*>(ahead + r * ahead_stride) + byte, _MM_HINT_T0);
    typename V::Reg weight[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) weight[r] = V::first(w + r * stride);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const auto v = V::load(in[n] + s * kStep);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][n] = V::fma(weight[r], v, sum[r][n]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) weight[r] = V::second(w + r * stride);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const auto v = V::load(in[n] + s * kStep + W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][n] = V::fma(weight[r], v, sum[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    if (tile == nullptr) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) V::store(sums + (r * N + n) * W, sum[r][n]);
    } else {
      float four[4];
      _mm_storeu_ps(four, V::sum4(sum[0][n], sum[R > 1 ? 1 : 0][n], sum[R > 2 ? 2 : 0][n], sum[R > 3 ? 3 : 0][n]));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) tile[n * kPanel + r] = four[r];
    }
  }
}

// Four panel rows at most, over the whole reduction axis cut so that the inputs stay in the first-level cache. The
// sums of the pieces before the last wait in `sums`.
template <class V, class D, int R, int N>
inline void dot_piece(const D* w, int64_t stride, int64_t size, const float* const* x, int64_t begin, int64_t end,
                      float* sums, float* tile, const D* ahead, int64_t ahead_stride) {
  constexpr int kStep = 2 * V::kWidth;
  const int64_t whole = size / kStep * kStep, stop = min64(end, whole);
  const bool last = end >= size, ragged = last && whole < size;
  if (stop > begin || !ragged)
    dot_block<V, D, R, N>(w + begin, stride, x, begin, (stop - begin) / kStep, sums, begin == 0,
                          last && !ragged ? tile : nullptr, ahead + begin, ahead_stride);
  if (!ragged) return;
  D rest[R * kStep] = {};
  for (int r = 0; r < R; ++r) memcpy(rest + r * kStep, w + r * stride + whole, sizeof(D) * (size - whole));
  dot_block<V, D, R, N>(rest, kStep, x, whole, 1, sums, whole == 0, tile, rest, 0);
}

// tile[n][r] = x[n] . w[r] for up to 32 rows.
template <class V, class D, int N>
inline void dot_panel(const D* w, int64_t stride, int rows, int64_t size, const float* const* x, float* tile,
                      const Ahead<D>& ahead) {
  constexpr int R = V::rows(N), W = V::kWidth, kRowsTogether = 16;
  alignas(64) float sums[kRowsTogether * N * W];
  int64_t piece = kInputBytes / (4 * N) / kGroup * kGroup;
  if (size <= piece + piece / 4) piece = size;
  const D* idle = reinterpret_cast<const D*>(x[0]);
  for (int top = 0; top < rows; top += kRowsTogether) {
    const int bottom = top + kRowsTogether < rows ? top + kRowsTogether : rows;
    for (int64_t begin = 0; begin < size; begin += piece) {
      const int64_t end = min64(begin + piece, size);
      for (int r = top; r < bottom;) {
        const bool block = r + R <= bottom;
        const int count = block ? R : 1;
        const D* fetch = idle;
        int64_t fetch_stride = 0;
        if (ahead.chain) {
          const bool more = r + count < rows;
          fetch = more ? w + (r + count) * stride : ahead.next;
          fetch_stride = more ? stride : ahead.next_stride;
        } else if (r / R % ahead.period == ahead.phase) {
          fetch = ahead.next + r * ahead.next_stride;
          fetch_stride = ahead.next_stride;
        }
        float* kept = sums + (r - top) * N * W;
        if (block)
          dot_piece<V, D, R, N>(w + r * stride, stride, size, x, begin, end, kept, tile + r, fetch, fetch_stride);
        else
          dot_piece<V, D, 1, N>(w + r * stride, stride, size, x, begin, end, kept, tile + r, fetch, fetch_stride);
        r += count;
      }
    }
  }
}

template <class V, class D>
inline void dot_panel_of(int tokens, const D* w, int64_t stride, int rows, int64_t size, const float* const* x,
                         float* tile, const Ahead<D>& ahead) {
  static_assert(V::kMaxTokens <= 6, "a case for each number of tokens");
  switch (tokens) {
    case 1: return dot_panel<V, D, 1>(w, stride, rows, size, x, tile, ahead);
    case 2: return dot_panel<V, D, 2>(w, stride, rows, size, x, tile, ahead);
    case 3: return dot_panel<V, D, 3>(w, stride, rows, size, x, tile, ahead);
    case 4: return dot_panel<V, D, 4>(w, stride, rows, size, x, tile, ahead);
    case 5: return dot_panel<V, D, 5>(w, stride, rows, size, x, tile, ahead);
    default: return dot_panel<V, D, V::kMaxTokens>(w, stride, rows, size, x, tile, ahead);
  }
}

}  // namespace
