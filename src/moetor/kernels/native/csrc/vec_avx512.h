// Sixteen floats: what the kernels need of AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>
#include <string.h>

#include "element.h"

namespace {

struct Avx512 {
  using Reg = __m512;
  using Input = float;  // what weights are multiplied with
  static constexpr int kWidth = 16;
  // Sums of 4 rows x 6 tokens or 2 rows x 12 tokens (the more tokens, the fewer bf16 weights to widen a sum), the
  // rows' weights and one input: 29 of 32 registers at most.
  static constexpr int kMaxTokens = 12;
  static constexpr int rows(int tokens) { return tokens <= 6 ? 4 : 2; }
  static constexpr int pairs(int tokens) { return tokens <= 6 ? 2 : 1; }  // columns form: 32 columns each

  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set(float v) { return _mm512_set1_ps(v); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const Bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }
  static Reg load(const Fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

  // The two halves of 32 neighbouring elements: even and odd ones for bf16 (one operation each), first and last
  // sixteen for the others. `split` inputs are laid out to match.
  static Reg first(const float* p) { return load(p); }
  static Reg second(const float* p) { return load(p + 16); }
  static Reg first(const Fp16* p) { return load(p); }
  static Reg second(const Fp16* p) { return load(p + 16); }
  static Reg first(const Bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
  static Reg second(const Bf16* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000)));
  }

  // 32 whole numbers of a byte each.
  static void widen_bytes(const uint8_t* from, Reg* to) {
    for (int i = 0; i < 2; ++i)
      to[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from + 16 * i))));
  }
  // The numbers of a table of sixteen that 16 bytes name: their low halves first, then their high halves. The lookup
  // takes no notice of the bits above the fourth.
  static void widen_nibbles(const uint8_t* from, const Reg* table, Reg* to) {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
    to[0] = _mm512_permutexvar_ps(codes, table[0]);
    to[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table[0]);
  }

  // Keeps a value that is used several times in a register; GCC would load it again from memory at each use.
  static Reg keep(Reg v) {
    __asm__("" : "+v"(v));
    return v;
  }

  static void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  static void store(Fp16* p, Reg v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store(Bf16* p, Reg v) {  // to nearest, ties to even; a NaN stays one
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, nan), 16);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(high));
  }

  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg min(Reg bound, Reg v) { return _mm512_min_ps(bound, v); }  // a NaN in `v` stays
  static Reg max(Reg bound, Reg v) { return _mm512_max_ps(bound, v); }
  static Reg abs(Reg v) { return _mm512_abs_ps(v); }
  static Reg round(Reg v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg scale(Reg v, Reg n) { return _mm512_scalef_ps(v, n); }  // v * 2^n
  static Reg copy_sign(Reg magnitude, Reg sign) {
    return _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
  }
  static Reg where_less(Reg a, Reg b, Reg then, Reg otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, then);
  }

  // (a0 b0 a1 b1 ...) and back.
  static void interleave(Reg& a, Reg& b) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const Reg first = _mm512_permutex2var_ps(a, low, b);
    b = _mm512_permutex2var_ps(a, high, b);
    a = first;
  }
  static void deinterleave(Reg& a, Reg& b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const Reg first = _mm512_permutex2var_ps(a, even, b);
    b = _mm512_permutex2var_ps(a, odd, b);
    a = first;
  }

  // The sums of 2 * kWidth columns as `first` and `second` of bf16 leave them, in their own order.
  static void order_columns(Reg& a, Reg& b) { interleave(a, b); }

  // The four horizontal sums. The order of the additions is the same for each of the four.
  static __m128 sum4(Reg a, Reg b, Reg c, Reg d) {
    const Reg ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const Reg cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const Reg abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
};

}  // namespace
