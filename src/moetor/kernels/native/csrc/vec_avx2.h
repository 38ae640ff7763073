// Eight floats: what the kernels need of AVX2, FMA and F16C. See vec_avx512.h for what each function promises.
#pragma once

#include <immintrin.h>

#include "element.h"

namespace {

struct Avx2 {
  using Reg = __m256;
  using Input = float;
  static constexpr int kWidth = 8;
  static constexpr int kMaxTokens = 6;
  static constexpr int rows(int tokens) { return tokens <= 2 ? 4 : 2; }  // 16 registers: at most 12 of sums
  static constexpr int pairs(int) { return 1; }

  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set(float v) { return _mm256_set1_ps(v); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load(const Bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static Reg load(const Fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

  static Reg first(const float* p) { return load(p); }
  static Reg second(const float* p) { return load(p + 8); }
  static Reg first(const Fp16* p) { return load(p); }
  static Reg second(const Fp16* p) { return load(p + 8); }
  static Reg first(const Bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16));
  }
  static Reg second(const Bf16* p) {
    const __m256i mask = _mm256_set1_epi32((int)0xffff0000);
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), mask));
  }

  static Reg keep(Reg v) {
    __asm__("" : "+x"(v));
    return v;
  }

  // 32 whole numbers of a byte each.
  static void widen_bytes(const uint8_t* from, Reg* to) {
    for (int i = 0; i < 4; ++i)
      to[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8 * i))));
  }
  // The numbers of a table of sixteen that 16 bytes name: their low halves first, then their high halves. A lookup sees
  // three bits; the fourth, moved to the sign, chooses between the halves of the table.
  static void widen_nibbles(const uint8_t* from, const Reg* table, Reg* to) {
    for (int i = 0; i < 4; ++i) {
      const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8 * (i % 2))));
      const __m256i codes = i < 2 ? bytes : _mm256_srli_epi32(bytes, 4);
      const Reg low = _mm256_permutevar8x32_ps(table[0], codes), high = _mm256_permutevar8x32_ps(table[1], codes);
      to[i] = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
    }
  }

  static void store(float* p, Reg v) { _mm256_storeu_ps(p, v); }
  static void store(Fp16* p, Reg v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store(Bf16* p, Reg v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const Reg is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const Reg chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(nan), is_nan);
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
    const __m256i packed = _mm256_packus_epi32(high, high);  // within each 128-bit half
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
  }

  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg min(Reg bound, Reg v) { return _mm256_min_ps(bound, v); }
  static Reg max(Reg bound, Reg v) { return _mm256_max_ps(bound, v); }
  static Reg abs(Reg v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
  static Reg round(Reg v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg scale(Reg v, Reg n) {  // in two halves, since 2^n alone may leave the range of a float
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(v, power(half)), power(_mm256_sub_epi32(whole, half)));
  }
  static Reg copy_sign(Reg magnitude, Reg sign) {
    return _mm256_or_ps(magnitude, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
  }
  static Reg where_less(Reg a, Reg b, Reg then, Reg otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }

  static void interleave(Reg& a, Reg& b) {
    const Reg low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    a = _mm256_permute2f128_ps(low, high, 0x20);
    b = _mm256_permute2f128_ps(low, high, 0x31);
  }
  static void deinterleave(Reg& a, Reg& b) {
    const Reg low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    const Reg even = _mm256_shuffle_ps(low, high, 0x88), odd = _mm256_shuffle_ps(low, high, 0xdd);
    a = even;
    b = odd;
  }

  static void order_columns(Reg& a, Reg& b) { interleave(a, b); }

  static __m128 sum4(Reg a, Reg b, Reg c, Reg d) {
    const Reg ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const Reg cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const Reg abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  }

 private:
  static Reg power(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
};

}  // namespace
