// The element types of weights, inputs and outputs.
#pragma once

#include <stdint.h>

namespace {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// Whether the two halves of a step are its even and its odd elements (see Avx512::first).
template <class D>
constexpr bool kSplit = false;
template <>
constexpr bool kSplit<Bf16> = true;

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;
// Whether the vectors V multiply pairs of bfloat16 as they are.
template <class V>
constexpr bool kPaired = kSame<typename V::Input, Bf16>;

}  // namespace
