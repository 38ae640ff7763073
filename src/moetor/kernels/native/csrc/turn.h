// Norms of rows, and queries and keys turned by their positions: computed in float32, rounded once.
#pragma once

#include "rows.h"
#include "team.h"

namespace {

constexpr int64_t kWidestHead = 1024;
constexpr int64_t kRowsAtOnce = 8;

// 1 / sqrt(mean of squares + eps) of `count` numbers.
template <class V, class D>
inline float inverse_norm(const D* row, int64_t count, float eps) {
  typename V::Reg sum[2] = {V::zero(), V::zero()};
  for (int64_t i = 0, half = 0; i < count; i += V::kWidth, half = 1 - half) {
    const auto v = load_some<V>(row + i, count - i);
    sum[half] = V::fma(v, v, sum[half]);
  }
  alignas(64) float total[4];
  _mm_store_ps(total, V::sum4(sum[0], sum[1], V::zero(), V::zero()));
  return 1.0f / __builtin_sqrtf((total[0] + total[1]) / static_cast<float>(count) + eps);
}

// to = from * factor * (weight + offset), or * factor alone for no weight.
template <class V, class From, class D, class To>
inline void scale_row(To* to, const From* from, const D* weight, int64_t count, float factor, float offset) {
  const auto by = V::set(factor), plus = V::set(offset);
  for (int64_t i = 0; i < count; i += V::kWidth) {
    auto v = V::mul(load_some<V>(from + i, count - i), by);
    if (weight != nullptr) v = V::mul(v, V::add(load_some<V>(weight + i, count - i), plus));
    store_some<V>(to + i, v, count - i);
  }
}

template <class V, class D>
int norm_rows(const MoetorNorm& a, StartTeam start) {
  const auto *x = static_cast<const D*>(a.x), *residual = static_cast<const D*>(a.residual);
  auto *out = static_cast<D*>(a.out), *total = static_cast<D*>(a.total);
  const auto row = [&](int64_t at) {
    const D* from = x + at;
    if (residual != nullptr) {  // written before it is normed, so that it is normed as it was rounded
      for (int64_t i = 0; i < a.width; i += V::kWidth) {
        const int64_t count = a.width - i;
        const auto sum = V::add(load_some<V>(from + i, count), load_some<V>(residual + at + i, count));
        store_some<V>(total + at + i, sum, count);
      }
      from = total + at;
    }
    const float inverse = inverse_norm<V>(from, a.width, a.eps);
    scale_row<V>(out + at, from, static_cast<const D*>(a.weight), a.width, inverse, a.offset);
  };
  const int64_t bytes = 3 * a.rows * a.width * static_cast<int64_t>(sizeof(D));
  in_team(ceil_div(a.rows, kRowsAtOnce), bytes, a.threads, start, [&](int64_t task) {
    for (int64_t r = task * kRowsAtOnce; r < min64((task + 1) * kRowsAtOnce, a.rows); ++r) row(r * a.width);
  });
  return kOk;
}

template <class V, class D, class C>
class Rotation {
 public:
  explicit Rotation(const MoetorRotate& args) : a(args) {}

  int run(StartTeam start) const {
    const int64_t bytes = 2 * a.tokens * (a.heads + a.kv_heads) * a.width * static_cast<int64_t>(sizeof(D));
    in_team(a.tokens, bytes, a.threads, start, [this](int64_t t) { token(t); });
    return kOk;
  }

 private:
  static constexpr int64_t kPad = 64;

  void token(int64_t t) const {
    const int64_t half = a.rotated / 2;
    float c1[kWidestHead / 2 + kPad], c2[kWidestHead / 2 + kPad], s1[kWidestHead / 2 + kPad], s2[kWidestHead / 2 + kPad];
    table(static_cast<const C*>(a.cos) + t * a.table_stride, half, c1, c2);
    table(static_cast<const C*>(a.sin) + t * a.table_stride, half, s1, s2);
    const auto* query = static_cast<const D*>(a.query) + t * a.query_stride;
    for (int64_t h = 0; h < a.heads; ++h)
      head(query + h * a.query_head_stride, a.query_weight, c1, c2, s1, s2,
           static_cast<D*>(a.query_out) + (t * a.heads + h) * a.width);
    const int64_t slot = a.slots == nullptr ? 0 : a.slots[t];
    if (slot < 0) return;
    const auto* key = static_cast<const D*>(a.key) + t * a.key_stride;
    const int64_t block = a.slots == nullptr ? 0 : slot / a.block_size, place = slot - block * a.block_size;
    auto* key_to = static_cast<D*>(a.key_out);
    key_to += a.slots == nullptr ? t * a.kv_heads * a.width : block * a.key_block_stride + place * a.key_slot_stride;
    const int64_t key_step = a.slots == nullptr ? a.width : a.key_cache_head_stride;
    for (int64_t h = 0; h < a.kv_heads; ++h)
      head(key + h * a.key_head_stride, a.key_weight, c1, c2, s1, s2, key_to + h * key_step);
    if (a.slots == nullptr) return;
    const auto* value = static_cast<const D*>(a.value) + t * a.value_stride;
    auto* value_to = static_cast<D*>(a.value_out) + block * a.value_block_stride + place * a.value_slot_stride;
    for (int64_t h = 0; h < a.kv_heads; ++h)
      memcpy(value_to + h * a.value_cache_head_stride, value + h * a.value_head_stride, sizeof(D) * a.value_width);
  }

  // The factors of each turn's first and second element.
  void table(const C* from, int64_t half, float* first, float* second) const {
    if (a.table == 2) {
      float both[kWidestHead + kPad];
      widen_row<V>(both, from, 2 * half, 1.0f);
      for (int64_t i = 0; i < half; ++i) first[i] = second[i] = both[2 * i];
      return;
    }
    widen_row<V>(first, from, half, 1.0f);
    widen_row<V>(second, a.table == 1 ? from : from + half, half, 1.0f);
  }

  void head(const D* from, const void* weight, const float* c1, const float* c2, const float* s1, const float* s2,
            D* to) const {
    alignas(64) float row[kWidestHead + kPad], turned[kWidestHead + kPad];
    const int64_t half = a.rotated / 2;
    widen_row<V>(row, from, a.width, 1.0f);
    if (a.norms)
      scale_row<V>(row, row, static_cast<const D*>(weight), a.width, inverse_norm<V>(row, a.width, a.eps), a.offset);
    if (a.pairs) {
      for (int64_t i = 0; i < half; ++i) {
        const float x = row[2 * i], y = row[2 * i + 1];
        turned[2 * i] = x * c1[i] - y * s1[i];
        turned[2 * i + 1] = y * c2[i] + x * s2[i];
      }
    } else {
      for (int64_t i = 0; i < half; ++i) {
        const float x = row[i], y = row[half + i];
        turned[i] = x * c1[i] - y * s1[i];
        turned[half + i] = y * c2[i] + x * s2[i];
      }
    }
    memcpy(turned + a.rotated, row + a.rotated, sizeof(float) * (a.width - a.rotated));
    narrow_row<V>(to, turned, a.width);
  }

  const MoetorRotate& a;
};

template <class V>
int run_norm(const MoetorNorm& args, StartTeam start) {
  return with_dtype(args.dtype, [&](auto type) { return norm_rows<V, typename decltype(type)::Element>(args, start); });
}

template <class V>
int run_rotate(const MoetorRotate& args, StartTeam start) {
  return with_dtype(args.dtype, [&](auto type) {
    using D = typename decltype(type)::Element;
    return args.table_dtype == kFloat32 ? Rotation<V, D, float>(args).run(start) : Rotation<V, D, D>(args).run(start);
  });
}

}  // namespace
