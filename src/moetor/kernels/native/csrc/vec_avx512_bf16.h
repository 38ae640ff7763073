// AVX-512 with products of bfloat16 pairs (AVX512_BF16) and of bytes (AVX512_VNNI).
#pragma once

#include "vec_avx512.h"

namespace {

struct Avx512Bf16 : Avx512 {
  using Input = Bf16;
  static constexpr int kMaxTokens = 6;  // nothing is widened: more tokens a block would save nothing

  using Pairs = __m512bh;  // 16 pairs of neighbouring elements
  static Pairs load_pairs(const Bf16* p) { return (Pairs)_mm512_loadu_si512(p); }
  // One pair in all places.
  static Pairs set_pair(const Bf16* p) {
    int32_t both;
    memcpy(&both, p, sizeof(both));
    return (Pairs)_mm512_set1_epi32(both);
  }
  static Pairs keep_pairs(Pairs v) {
    __asm__("" : "+v"(v));
    return v;
  }
  // sum + the two products of each pair. Subnormal numbers count as zero.
  static Reg dot(Reg sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, a, b); }

  // Two rows of 32 columns (the second may be null: zeros) as pairs of one column each: the first four of every eight
  // columns, then the others.
  static void zip_columns(const Bf16* a, const Bf16* b, Pairs& first, Pairs& second) {
    const __m512i upper = _mm512_loadu_si512(a);
    const __m512i lower = b == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(b);
    first = (Pairs)_mm512_unpacklo_epi16(upper, lower);
    second = (Pairs)_mm512_unpackhi_epi16(upper, lower);
  }
  // The sums of columns in that order, back in their own.
  static void order_columns(Reg& a, Reg& b) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    const Reg first = _mm512_permutex2var_ps(a, low, b);
    b = _mm512_permutex2var_ps(a, high, b);
    a = first;
  }
};

}  // namespace
