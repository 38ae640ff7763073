// Products with weights whose reduction axis is contiguous ([J, H] and [H, I]), read in place.
//
// A block is a few weight rows times up to kMaxTokens inputs. Every sum is one vector that runs along the reduction
// axis in the same order whatever the block, and is added across its lanes by the same tree: a token's bits therefore
// depend neither on the other tokens nor on how the work was cut. Rows may even be computed twice.
#pragma once

#include <immintrin.h>

#include "rows.h"

namespace {

constexpr int kPanel = 32;          // rows of one panel: the unit of output
constexpr int kTile = kPanel + 4;   // a block may write past the panel
constexpr int64_t kInputBytes = 32768;  // inputs of a block that stay in the first-level cache
constexpr int kCacheLine = 64;

// What to fetch while a panel is computed. Token block `phase` of `period` fetches its share of the panel at `next`;
// with a single token block each row block fetches the one after it instead, and the last one `next`.
template <class D>
struct Ahead {
  const D* next;
  int64_t next_stride;
  int64_t period, phase;
};

// tile[n][r] = the sum over the lanes of sum[r][n]. A call would keep the sums in memory.
template <class V, int R, int N>
inline __attribute__((always_inline)) void store_sums(typename V::Reg (&sum)[R][N], float* tile) {
  constexpr int kTokensAtOnce = 4 / R;  // sum4 adds up four: one token's rows, or two rows of two tokens
#pragma GCC unroll 16
  for (int n = 0; n < N; n += kTokensAtOnce) {
    const int m = n + 1 < N ? n + 1 : n;
    const __m128 four = R == 4 ? V::sum4(sum[0][n], sum[1][n], sum[R - 2][n], sum[R - 1][n])
                               : V::sum4(sum[0][n], sum[1][n], sum[0][m], sum[1][m]);
    if (R == 4) {
      _mm_storeu_ps(tile + n * kTile, four);
    } else {
      _mm_storel_pi(reinterpret_cast<__m64*>(tile + n * kTile), four);
      _mm_storeh_pi(reinterpret_cast<__m64*>(tile + m * kTile), four);
    }
  }
}

// One step of R rows and N inputs: each vector of inputs is loaded once, each weight is widened once.
template <class V, class D, int R, int N>
inline __attribute__((always_inline)) void dot_step(const D* w, int64_t stride, const float* x,
                                                    typename V::Reg (&sum)[R][N]) {
  constexpr int W = V::kWidth, kStep = 2 * W;
  typename V::Reg weight[R];
#pragma GCC unroll 16
  for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) weight[r] = half == 0 ? V::first(w + r * stride) : V::second(w + r * stride);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const auto v = V::keep(V::load(x + n * kStep + half * W));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r][n] = V::fma(weight[r], v, sum[r][n]);
    }
  }
}

template <class V, class D, int R, int N>
inline __attribute__((always_inline)) void dot_step(const D* w, int64_t stride, const Bf16* x,
                                                    typename V::Reg (&sum)[R][N]) {
  typename V::Pairs weight[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) weight[r] = V::load_pairs(w + r * stride);
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
    const auto v = V::keep_pairs(V::load_pairs(x + n * 2 * V::kWidth));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r][n] = V::dot(sum[r][n], weight[r], v);
  }
}

// While R rows are computed, step by step: fetches R steps of the rows at `ahead`, one row after the other, since memory
// is slower where it is asked for several streams at a time. With a stride of 0, fetches one row. `kLines`: how many steps
// are fetched in one.
template <class V, class D, int R, int N, int kLines, class X>
inline void dot_block(const D* w, int64_t stride, const X* x, int64_t steps, float* sums, bool first, float* tile,
                      const D* ahead, int64_t ahead_stride) {
  constexpr int W = V::kWidth, kStep = 2 * W;
  typename V::Reg sum[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[r][n] = first ? V::zero() : V::load(sums + (r * N + n) * W);
  const bool one = ahead_stride == 0;
  const int64_t each = one ? 0 : kStep, skip = one ? 0 : ahead_stride - steps * kStep;
  int64_t left = steps;
  for (int64_t s = 0; s < steps; ++s, w += kStep, x += N * kStep) {
#pragma GCC unroll 16
    for (int r = 0; r < kLines; ++r)
#pragma GCC unroll 16
      for (int byte = 0; byte < static_cast<int>(kStep * sizeof(D)); byte += kCacheLine)
        _mm_prefetch(reinterpret_cast<const char*>(ahead + r * each) + byte, _MM_HINT_T2);
    ahead += one ? kStep : R * kStep;
    left -= R;
    if (left <= 0) {
      ahead += skip;
      left += steps;
    }
    dot_step<V, D, R, N>(w, stride, x, sum);
  }
  if (tile == nullptr) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) V::store(sums + (r * N + n) * W, sum[r][n]);
    return;
  }
  store_sums<V, R, N>(sum, tile);
}

// R rows over [begin, end) of the reduction axis: one piece of it, cut so that the inputs stay in the first-level
// cache. The sums of the pieces before the last wait in `sums`.
template <class V, class D, int R, int N, int kLines = R, class X>
inline void dot_piece(const D* w, int64_t stride, int64_t size, const X* x, int64_t begin, int64_t end,
                      float* sums, float* tile, const D* ahead, int64_t ahead_stride) {
  constexpr int kStep = 2 * V::kWidth;
  const int64_t whole = size / kStep * kStep, stop = min64(end, whole);
  const bool last = end >= size, ragged = last && whole < size;
  if (stop > begin)
    dot_block<V, D, R, N, kLines>(w + begin, stride, x + begin * N, (stop - begin) / kStep, sums, begin == 0,
                          last && !ragged ? tile : nullptr, ahead + begin, ahead_stride);
  if (!ragged) return;
  D rest[R * kStep] = {};
  for (int r = 0; r < R; ++r) memcpy(rest + r * kStep, w + r * stride + whole, sizeof(D) * (size - whole));
  dot_block<V, D, R, N, 1>(rest, kStep, x + whole * N, 1, sums, whole == 0, tile, rest, 0);
}

// tile[n][r] = x[n] . w[r] for up to 32 rows.
template <class V, class D, int N, class X>
void dot_panel(const D* w, int64_t stride, int rows, int64_t size, const X* x, float* tile,
               const Ahead<D>& ahead) {
  constexpr int R = V::rows(N), W = V::kWidth, kRowsTogether = 16;
  static_assert(R == 2 || R == 4, "sum4 adds up four");
  alignas(64) float sums[kRowsTogether * N * W];
  if (rows < R) {  // fewer rows than a block has: each one alone, R times over
    for (int r = 0; r < rows; ++r)
      dot_piece<V, D, R, N>(w + r * stride, 0, size, x, 0, size, sums, tile + r, w, 0);
    return;
  }
  const int64_t pieces = ceil_div(static_cast<int64_t>(sizeof(X)) * N * size, kInputBytes);
  const int64_t piece = round_up(ceil_div(size, pieces), kGroup);
  const D* idle = reinterpret_cast<const D*>(x);
  for (int top = 0; top < rows; top += kRowsTogether) {
    const int bottom = top + kRowsTogether < rows ? top + kRowsTogether : rows;
    for (int64_t begin = 0; begin < size; begin += piece) {
      const int64_t end = min64(begin + piece, size);
      for (int block = 0; top + block * R < bottom; ++block) {
        const int at = top + block * R, r = at + R <= rows ? at : rows - R;  // the last block may step back
        const D* fetch = idle;
        int64_t fetch_stride = 0;
        if (ahead.period == 1) {
          const bool more = at + R < rows;
          fetch = more ? w + (at + R) * stride : ahead.next;
          fetch_stride = more ? stride : ahead.next_stride;
        } else {  // one row, in some of the passes over these rows
          const int64_t turn = (at / R + ahead.phase) % ahead.period;
          if (turn * R % ahead.period < R) fetch = ahead.next + (at + turn * R / ahead.period) * ahead.next_stride;
        }
        dot_piece<V, D, R, N>(w + r * stride, stride, size, x, begin, end, sums + block * R * N * W, tile + r, fetch,
                              fetch_stride);
      }
    }
  }
}

template <class V, class D, int N = 1, class X>
inline void dot_panel_of(int tokens, const D* w, int64_t stride, int rows, int64_t size, const X* x, float* tile,
                         const Ahead<D>& ahead) {
  if (tokens == N) return dot_panel<V, D, N>(w, stride, rows, size, x, tile, ahead);
  if constexpr (N < V::kMaxTokens) dot_panel_of<V, D, N + 1>(tokens, w, stride, rows, size, x, tile, ahead);
}

}  // namespace
