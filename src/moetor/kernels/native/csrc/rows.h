// Rows of numbers between their storage type and the float32 workspace.
#pragma once

#include <string.h>

#include "element.h"
#include "plan.h"

namespace {

template <class V, class D>
inline typename V::Reg load_some(const D* from, int64_t count) {
  if (count >= V::kWidth) return V::load(from);
  D buffer[V::kWidth] = {};
  memcpy(buffer, from, sizeof(D) * count);
  return V::load(buffer);
}

template <class V, class D>
inline void store_some(D* to, typename V::Reg v, int64_t count) {
  if (count >= V::kWidth) return V::store(to, v);
  D buffer[V::kWidth];
  V::store(buffer, v);
  memcpy(to, buffer, sizeof(D) * count);
}

// A block of `tokens` inputs is stored step by step (two vectors of the reduction axis), each step token by token: the
// dot product then walks it with one pointer. With tokens = 1 that is a plain row. This writes elements [begin, begin +
// count) of token `token`, times `factor`, and zeros up to a multiple of 32; `begin` is a multiple of 32. `split`: each
// step holds its even elements first, then its odd ones, as the dot product of widened bf16 wants them.
template <class V, class X, class D>
inline void pack_row(X* block, int tokens, int token, int64_t begin, const D* from, int64_t count, float factor,
                     bool split) {
  constexpr int W = V::kWidth, kStep = 2 * W;
  X* to = block + begin * tokens + token * kStep;
  int64_t i = 0;
  if (kSame<X, D> && factor == 1.0f && !split)
    for (; i + kStep <= count; i += kStep, to += tokens * kStep) memcpy(to, from + i, sizeof(X) * kStep);
  for (; i < round_up(count, kGroup); i += kStep, to += tokens * kStep) {
    auto a = i < count ? load_some<V>(from + i, count - i) : V::zero();
    auto b = i + W < count ? load_some<V>(from + i + W, count - i - W) : V::zero();
    if (factor != 1.0f) {
      a = V::mul(a, V::set(factor));
      b = V::mul(b, V::set(factor));
    }
    if (split) V::deinterleave(a, b);
    V::store(to, a);
    V::store(to + W, b);
  }
}

// Inputs as the dot products with plain weights want them.
template <class V, bool split = false>
struct Steps {
  using Input = typename V::Input;
  using Columns = Steps<V>;  // the same for weights in columns form
  // Elements of a row of `size`.
  static int64_t width(int64_t size) { return round_up(size, kGroup); }
  template <class D>
  static void put(Input* block, int tokens, int token, int64_t begin, const D* from, int64_t count, float factor) {
    pack_row<V>(block, tokens, token, begin, from, count, factor, split);
  }
};

// to[0..count) = from[0..count) * factor; both may be written past their end, up to a multiple of 32.
template <class V, class D>
inline void widen_row(float* to, const D* from, int64_t count, float factor) {
  pack_row<V>(to, 1, 0, 0, from, count, factor, false);
}

// Rounds a packed row to s * q, s = max |x| / 127 and q a whole number within +-127: inputs as int8, one scale a token.
template <class V>
inline void round_row(float* block, int tokens, int token, int64_t count) {
  constexpr int W = V::kWidth, kStep = 2 * W;
  float* const row = block + token * kStep;
  const int64_t steps = round_up(count, kGroup) / kStep, stride = static_cast<int64_t>(tokens) * kStep;
  auto most = V::zero();
  for (int64_t s = 0; s < steps; ++s)
    for (int half = 0; half < kStep; half += W) most = V::max(most, V::abs(V::load(row + s * stride + half)));
  float lanes[W];
  V::store(lanes, most);
  float largest = 0.0f;
  for (const float lane : lanes) largest = lane > largest || lane != lane ? lane : largest;
  const float scale = largest > 0.0f || largest != largest ? largest / 127.0f : 1.0f;
  const auto by = V::set(scale);
  for (int64_t s = 0; s < steps; ++s)
    for (int half = 0; half < kStep; half += W) {
      float* at = row + s * stride + half;
      auto q = V::round(V::div(V::load(at), by));
      q = V::min(V::set(127.0f), V::max(V::set(-127.0f), q));
      V::store(at, V::mul(q, by));
    }
}

// to[0..count) = from[0..count), rounded to nearest even.
template <class V, class D>
inline void narrow_row(D* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += V::kWidth) store_some<V>(to + i, V::load(from + i), count - i);
}

// row[0..count) += bias[0..count); the row extends to a multiple of 32.
template <class V, class D>
inline void add_bias(float* row, const D* bias, int64_t count) {
  for (int64_t i = 0; i < count; i += V::kWidth)
    V::store(row + i, V::add(V::load(row + i), load_some<V>(bias + i, count - i)));
}

// to[0..count) += weight * from[0..count); both extend to a multiple of 32.
template <class V>
inline void add_weighted(float* to, const float* from, int64_t count, float weight) {
  const auto w = V::set(weight);
  for (int64_t i = 0; i < count; i += V::kWidth) V::store(to + i, V::fma(w, V::load(from + i), V::load(to + i)));
}

}  // namespace
