// The activation between the two products, in float32, with exp, tanh and erfc to about one unit in the last place.
#pragma once

#include "api.h"

namespace {

template <class V>
inline typename V::Reg polynomial(typename V::Reg x, const float* coefficients, int count) {
  auto sum = V::set(coefficients[0]);
  for (int i = 1; i < count; ++i) sum = V::fma(sum, x, V::set(coefficients[i]));
  return sum;
}

// 2^n * e^r with |r| <= ln 2 / 2 (Cephes expf).
template <class V>
inline typename V::Reg exp(typename V::Reg x) {
  static constexpr float kTerms[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                     4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  x = V::min(V::set(89.0f), V::max(V::set(-104.0f), x));  // beyond: infinity, zero
  const auto n = V::round(V::mul(x, V::set(1.44269504088896341f)));
  auto r = V::fma(n, V::set(-0.693359375f), x);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  const auto p = V::fma(polynomial<V>(r, kTerms, 6), V::mul(r, r), V::add(r, V::set(1.0f)));
  return V::scale(p, n);
}

template <class V>
inline typename V::Reg sigmoid(typename V::Reg x) {
  const auto one = V::set(1.0f);
  return V::div(one, V::add(one, exp<V>(V::sub(V::zero(), x))));
}

// Odd polynomial near zero (Cephes tanhf), 1 - 2 / (e^2x + 1) elsewhere.
template <class V>
inline typename V::Reg tanh(typename V::Reg x) {
  static constexpr float kTerms[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                                     1.33314422036e-1f, -3.33332819422e-1f};
  const auto size = V::abs(x), square = V::mul(x, x), one = V::set(1.0f);
  const auto near = V::fma(V::mul(polynomial<V>(square, kTerms, 5), square), x, x);
  const auto ratio = V::div(V::set(2.0f), V::add(exp<V>(V::add(size, size)), one));
  return V::where_less(size, V::set(0.625f), near, V::copy_sign(V::sub(one, ratio), x));
}

// erfc(z), z >= 0, to 1.2e-7 relative everywhere (Press et al., Numerical Recipes, 6.2), so that gelu keeps its digits
// for large negative inputs too.
template <class V>
inline typename V::Reg erfc_positive(typename V::Reg z) {
  static constexpr float kTerms[] = {0.17087277f,  -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                                     -0.18628806f, 0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
  const auto t = V::div(V::set(1.0f), V::fma(z, V::set(0.5f), V::set(1.0f)));
  const auto exponent = V::fma(V::sub(V::zero(), z), z, polynomial<V>(t, kTerms, 10));
  return V::mul(t, exp<V>(exponent));
}

template <class V, int kName>
inline typename V::Reg pointwise(typename V::Reg x, const MoetorExperts& a) {
  if constexpr (kName == kSilu) {
    return V::mul(x, sigmoid<V>(V::mul(x, V::set(a.alpha))));
  } else if constexpr (kName == kGelu) {
    const auto tail = erfc_positive<V>(V::mul(V::abs(x), V::set(0.70710678118654752f)));
    const auto twice = V::where_less(x, V::zero(), tail, V::sub(V::set(2.0f), tail));
    return V::mul(V::mul(x, V::set(0.5f)), twice);
  } else if constexpr (kName == kGeluTanh) {  // 1 + tanh(y) = 2 sigmoid(2 y) keeps its digits for negative y
    const auto inner = V::fma(V::mul(V::mul(x, x), x), V::set(0.044715f), x);
    return V::mul(x, sigmoid<V>(V::mul(inner, V::set(1.5957691216057308f))));
  } else if constexpr (kName == kRelu) {
    return V::max(V::zero(), x);
  } else {
    const auto positive = V::max(V::zero(), x);
    return V::mul(positive, positive);
  }
}

template <class V, int kName>
inline void activate_span(const MoetorExperts& a, const float* gate, const float* up, int count, float* out) {
  const auto limit = V::set(a.limit), minus_limit = V::set(-a.limit);
  for (int i = 0; i < count; i += V::kWidth) {
    auto g = V::load(gate + i);
    if (a.limit_place == kLimitBefore) g = V::min(limit, g);
    if (!a.gated) {
      g = pointwise<V, kName>(g, a);
      if (a.limit_place == kLimitAfter) g = V::min(limit, g);
      V::store(out + i, g);
      continue;
    }
    auto u = V::load(up + i);
    if (a.limit_place == kLimitBefore) u = V::min(limit, V::max(minus_limit, u));
    if (a.softcap != 0.0f) {  // softcap(g) * sigmoid(g) * softcap(u)
      const auto cap = V::set(a.softcap), capped_g = V::mul(cap, tanh<V>(V::div(g, cap)));
      const auto up_cap = V::set(a.up_softcap), capped_u = V::mul(up_cap, tanh<V>(V::div(u, up_cap)));
      V::store(out + i, V::mul(V::mul(capped_g, sigmoid<V>(g)), capped_u));
      continue;
    }
    g = pointwise<V, kName>(g, a);
    if (a.limit_place == kLimitAfter) {
      g = V::min(limit, g);
      u = V::min(limit, V::max(minus_limit, u));
    }
    V::store(out + i, V::mul(g, V::add(u, V::set(a.up_shift))));
  }
}

// out[0..count) from gate and up (ungated: gate alone). Works on whole vectors: the buffers extend to a multiple of 32.
template <class V>
inline void activate(const MoetorExperts& a, const float* gate, const float* up, int count, float* out) {
  switch (a.activation) {
    case kSilu: return activate_span<V, kSilu>(a, gate, up, count, out);
    case kGelu: return activate_span<V, kGelu>(a, gate, up, count, out);
    case kGeluTanh: return activate_span<V, kGeluTanh>(a, gate, up, count, out);
    case kRelu: return activate_span<V, kRelu>(a, gate, up, count, out);
    default: return activate_span<V, kRelu2>(a, gate, up, count, out);
  }
}

}  // namespace
