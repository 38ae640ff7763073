// Attention of single tokens over a paged cache: each sequence's keys are read where they lie, and no others.
//
// The softmax is carried along from one piece of the keys to the next (Milakov and Gimelshein 2018). A sequence's bits
// depend neither on the other sequences nor on the threads.
#pragma once

#include "activation.h"
#include "rows.h"
#include "team.h"

namespace {

constexpr int kPiece = 128;  // keys whose weights are held at a time

template <class V, class D>
class Attention {
 public:
  // Queries that share a key's way through the registers: their sums with four keys must fit in.
  static constexpr int kQueries = V::kWidth == 16 ? 4 : 2;

  explicit Attention(const MoetorAttention& args)
      : a(args), group_(args.heads / args.kv_heads), parts_(ceil_div(group_, kQueries)),
        ldq_(round_up(args.width, V::kWidth)), ldo_(round_up(args.value_width, 2 * V::kWidth)) {}

  int run(StartTeam start) const {
    int64_t keys = 0;
    for (int64_t s = 0; s < a.sequences; ++s) keys += a.lens[s] - first_key(s);
    const int64_t bytes = keys * a.kv_heads * (a.width + a.value_width) * static_cast<int64_t>(sizeof(D));
    const int64_t heads = a.kv_heads * parts_;
    in_team(a.sequences * heads, bytes, a.threads, start, [&](int64_t task) {
      const int64_t part = task % parts_, first = part * kQueries;
      attend_of<kQueries>(min64(kQueries, group_ - first), task / heads, task / parts_ % a.kv_heads, first);
    });
    return kOk;
  }

 private:
  struct Piece {
    const D* keys[kPiece + 4];
    const D* values[kPiece + 4];
    alignas(64) float weights[kQueries][kPiece];
  };

  int64_t first_key(int64_t s) const {
    const int64_t at = a.lens[s] - 1;
    if (a.window > 0) return max64(0, at + 1 - a.window);
    return a.chunk > 0 ? at / a.chunk * a.chunk : 0;
  }

  template <int Q>
  void attend_of(int64_t queries, int64_t s, int64_t kv, int64_t first) const {
    if (queries == Q) return attend<Q>(s, kv, first);
    if constexpr (Q > 1) attend_of<Q - 1>(queries, s, kv, first);
  }

  template <int Q>
  void attend(int64_t s, int64_t kv, int64_t first) const {
    float query[Q * ldq_], out[Q * ldo_];  // NOLINT: widths are those of heads
    float most[Q], total[Q];
    const int64_t head = kv * group_ + first;
    for (int q = 0; q < Q; ++q) {
      const D* from = static_cast<const D*>(a.query) + s * a.query_stride + (head + q) * a.query_head_stride;
      for (int64_t d = 0; d < ldq_; d += V::kWidth)
        V::store(query + q * ldq_ + d, V::mul(load_some<V>(from + d, a.width - d), V::set(a.scale)));
      most[q] = a.sinks == nullptr ? -__builtin_inff() : a.sinks[head + q];
      total[q] = a.sinks == nullptr ? 0.0f : 1.0f;
    }
    memset(out, 0, sizeof(out));
    Piece piece;
    for (int64_t begin = first_key(s); begin < a.lens[s]; begin += kPiece) {
      const int count = static_cast<int>(min64(kPiece, a.lens[s] - begin));
      find(s, kv, begin, count, piece);
      score<Q>(query, count, piece);
      for (int q = 0; q < Q; ++q) weigh(count, piece.weights[q], most[q], total[q], out + q * ldo_);
      gather<Q>(count, piece, out);
    }
    for (int q = 0; q < Q; ++q) {
      float* row = out + q * ldo_;
      const auto by = V::set(1.0f / total[q]);
      for (int64_t d = 0; d < ldo_; d += V::kWidth) V::store(row + d, V::mul(V::load(row + d), by));
      narrow_row<V>(static_cast<D*>(a.out) + (s * a.heads + head + q) * a.value_width, row, a.value_width);
    }
  }

  // Where the keys are; behind the last one it is repeated, so that four can be read at a time.
  void find(int64_t s, int64_t kv, int64_t begin, int count, Piece& piece) const {
    const int32_t* table = a.table + s * a.table_stride;
    const auto* keys = static_cast<const D*>(a.keys) + kv * a.key_head_stride;
    const auto* values = static_cast<const D*>(a.values) + kv * a.value_head_stride;
    int64_t block = begin / a.block_size, place = begin % a.block_size;
    for (int j = 0; j < count; ++j) {
      piece.keys[j] = keys + table[block] * a.key_block_stride + place * a.key_slot_stride;
      piece.values[j] = values + table[block] * a.value_block_stride + place * a.value_slot_stride;
      fetch(piece.keys[j], a.width);
      fetch(piece.values[j], a.value_width);
      if (++place == a.block_size) {
        place = 0;
        ++block;
      }
    }
    for (int j = count; j < static_cast<int>(round_up(count, 4)); ++j) piece.keys[j] = piece.keys[count - 1];
  }

  // Blocks lie anywhere: all that a piece reads is asked for at once.
  static void fetch(const D* row, int64_t width) {
    constexpr int64_t kLine = 64 / sizeof(D);
    for (int64_t d = 0; d < width; d += kLine) _mm_prefetch(reinterpret_cast<const char*>(row + d), _MM_HINT_T0);
  }

  template <int Q>
  void score(const float* query, int count, Piece& piece) const {
    const int64_t whole = a.width / V::kWidth * V::kWidth;
    for (int j = 0; j < count; j += 4) {
      const D* const* keys = piece.keys + j;
      typename V::Reg sum[Q][4];
      for (int q = 0; q < Q; ++q)
        for (int k = 0; k < 4; ++k) sum[q][k] = V::zero();
      const auto step = [&](int64_t d, auto load) {
        for (int k = 0; k < 4; ++k) {
          const auto key = load(keys[k] + d);
          for (int q = 0; q < Q; ++q) sum[q][k] = V::fma(V::load(query + q * ldq_ + d), key, sum[q][k]);
        }
      };
      for (int64_t d = 0; d < whole; d += V::kWidth) step(d, [](const D* at) { return V::load(at); });
      if (whole < a.width) step(whole, [&](const D* at) { return load_some<V>(at, a.width - whole); });
      for (int q = 0; q < Q; ++q)
        _mm_storeu_ps(piece.weights[q] + j, V::sum4(sum[q][0], sum[q][1], sum[q][2], sum[q][3]));
    }
  }

  // Scores become weights relative to the largest score so far, to which what was summed before is adapted.
  void weigh(int count, float* scores, float& most, float& total, float* out) const {
    if (a.softcap != 0.0f) {
      const auto cap = V::set(a.softcap);
      for (int j = 0; j < count; j += V::kWidth)
        V::store(scores + j, V::mul(cap, tanh<V>(V::div(V::load(scores + j), cap))));
    }
    float largest = most;
    for (int j = 0; j < count; ++j) largest = scores[j] > largest || scores[j] != scores[j] ? scores[j] : largest;
    for (int j = count; j < static_cast<int>(round_up(count, V::kWidth)); ++j) scores[j] = -__builtin_inff();
    if (largest != most && total != 0.0f) {
      alignas(64) float lanes[V::kWidth];
      V::store(lanes, exp<V>(V::set(most - largest)));
      total *= lanes[0];
      const auto factor = V::set(lanes[0]);
      for (int64_t d = 0; d < ldo_; d += V::kWidth) V::store(out + d, V::mul(V::load(out + d), factor));
    }
    most = largest;
    auto sum = V::zero();
    const auto minus = V::set(most);
    for (int j = 0; j < count; j += V::kWidth) {
      const auto weight = exp<V>(V::sub(V::load(scores + j), minus));
      V::store(scores + j, weight);
      sum = V::add(sum, weight);
    }
    alignas(64) float sums[4];
    _mm_store_ps(sums, V::sum4(sum, V::zero(), V::zero(), V::zero()));
    total += sums[0];
  }

  template <int Q>
  void gather(int count, const Piece& piece, float* out) const {
    constexpr int W = V::kWidth;
    for (int64_t d = 0; d < a.value_width; d += 2 * W) {
      typename V::Reg sum[Q][2];
      for (int q = 0; q < Q; ++q)
        for (int half = 0; half < 2; ++half) sum[q][half] = V::load(out + q * ldo_ + d + half * W);
      const auto add = [&](auto load) {
        for (int j = 0; j < count; ++j)
          for (int half = 0; half < 2; ++half) {
            const auto value = load(piece.values[j] + d + half * W, a.value_width - d - half * W);
            for (int q = 0; q < Q; ++q) sum[q][half] = V::fma(V::set(piece.weights[q][j]), value, sum[q][half]);
          }
      };
      if (d + 2 * W <= a.value_width)
        add([](const D* at, int64_t) { return V::load(at); });
      else
        add([](const D* at, int64_t rest) { return rest > 0 ? load_some<V>(at, rest) : V::zero(); });
      for (int q = 0; q < Q; ++q)
        for (int half = 0; half < 2; ++half) V::store(out + q * ldo_ + d + half * W, sum[q][half]);
    }
  }

  const MoetorAttention& a;
  const int64_t group_, parts_, ldq_, ldo_;
};

template <class V>
int run_attention(const MoetorAttention& args, StartTeam start) {
  return with_dtype(args.dtype, [&](auto type) {
    return Attention<V, typename decltype(type)::Element>(args).run(start);
  });
}

}  // namespace
