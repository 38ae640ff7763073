// Products of many tokens, which arithmetic bounds: rows of weights stay in the caches while tokens pass over them.
//
// Sums are the same, in the same order, as those of `dot.h`: pieces of the reduction axis take them up where the piece
// before left them.
#pragma once

#include "dot.h"

namespace {

constexpr int64_t kManySpan = 4096;   // of the reduction axis: a panel's piece of it stays in the second-level cache
constexpr int64_t kManyPiece = 2048;  // a block's inputs of a piece stay in the first-level cache

// A block of N tokens and `rows` rows, over [begin, end). Meanwhile the same piece of the panel at `next` is fetched, of
// which each of `blocks` blocks fetches some rows.
template <class V, class D, int N = 1, class X>
inline void many_piece(int tokens, const D* w, int64_t stride, int rows, int64_t size, const X* x,
                       int64_t begin, int64_t end, float* sums, float* tile, const D* next, int64_t next_stride,
                       int64_t block, int64_t blocks) {
  if (tokens == N) {
    constexpr int R = V::rows(N), kTimes = kPanel / R;
    for (int at = 0, i = 0; at < rows; at += R, ++i, sums += R * N * V::kWidth) {
      const int r = at + R <= rows ? at : rows - R;  // the last block may step back
      const int64_t turn = block * kTimes + i, turns = blocks * kTimes, row = turn * kPanel / turns;
      const bool due = turn == 0 || row != (turn - 1) * kPanel / turns;
      const D* const fetch = due ? next + row * next_stride : reinterpret_cast<const D*>(x);
      dot_piece<V, D, R, N, 1>(w + r * stride, stride, size, x, begin, end, sums, tile + r, fetch, 0);
    }
    return;
  }
  if constexpr (N < V::kMaxTokens)
    many_piece<V, D, N + 1>(tokens, w, stride, rows, size, x, begin, end, sums, tile, next, next_stride, block, blocks);
}

// tiles[block][n][r] = x[n] . w[r] for up to 32 rows, four at least, and blocks [first, last) of tokens; x(block) are a
// block's inputs. Meanwhile the panel at `next` is fetched.
template <class V, class D, class Blocks, class Inputs>
void many_panel(const D* w, int64_t stride, int rows, int64_t size, const Blocks& blocks, int64_t first, int64_t last,
                const Inputs& x, float* sums, float* tiles, const D* next, int64_t next_stride) {
  constexpr int64_t kSums = kPanel * V::kMaxTokens * V::kWidth;
  const int64_t spans = ceil_div(size, kManySpan), span = round_up(ceil_div(size, spans), kGroup);
  for (int64_t start = 0; start < size; start += span)
    for (int64_t block = first; block < last; ++block) {
      const int64_t stop = min64(start + span, size), place = block - first;
      for (int64_t begin = start; begin < stop; begin += kManyPiece)
        many_piece<V, D>(blocks.size(block), w, stride, rows, size, x(block), begin, min64(begin + kManyPiece, stop),
                         sums + (spans == 1 ? 0 : place * kSums), tiles + place * V::kMaxTokens * kTile, next, next_stride,
                         place, last - first);
    }
}

}  // namespace
