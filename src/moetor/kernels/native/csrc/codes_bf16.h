// Products with quantised weights by AVX512_BF16 and AVX512_VNNI.
//
// A code is a bfloat16 number, so products with bfloat16 inputs are exact; they are added up in float32 over a group,
// and the group's sum is multiplied by its scale. Bytes times bytes are added up in 32-bit whole numbers.
#pragma once

#include <type_traits>

#include "codes.h"
#include "vec_avx512_bf16.h"

namespace {

// --- codes of half a byte ----------------------------------------------------------------------------------------------

struct PerChunk {  // the scale of all codes of a chunk
  float value;
};
struct E8m0 {  // a scale: 2^(bits - 127)
  uint8_t bits;
};

constexpr int kChunk = 128;  // codes in one vector of 64 bytes: four steps
constexpr int kChunkBytes = 64;

// The numbers of `nibble_table`, centred where there are zero points (these are then less 8 too). Twice sixteen: the
// lookup sees five bits.
template <int kind>
inline __m512i bf16_table() {
  alignas(64) static const uint16_t centred[32] = {
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
      0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
      0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
  alignas(64) static const uint16_t e2m1[32] = {
      0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80,
      0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0, 0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
      0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};
  return _mm512_load_si512(kind == kE2m1 ? e2m1 : centred);
}

// Inputs in the order in which a vector of codes gives its numbers: one lookup in its 16-bit words for each of their four
// halves of bytes. So each quarter of a vector belongs to one step of 32 codes: of vector 0 the even ones of the first
// sixteen, of 1 the even ones of the other sixteen, of 2 and 3 the odd ones. With `kSums` the sum of the inputs that each
// 32 bits of the four vectors see follows them.
template <bool kSums>
struct Chunks {
  using Input = Bf16;
  using Columns = Chunks;
  static constexpr int64_t kElements = kChunk + (kSums ? 32 : 0);
  static int64_t width(int64_t size) { return ceil_div(size, kChunk) * kElements; }

  template <class D>
  static __m512i row_of(const D* from, int64_t count, float factor) {
    const auto by = Avx512::set(factor);
    const auto low = Avx512::mul(load_some<Avx512>(from, count), by);
    const auto high = count > 16 ? Avx512::mul(load_some<Avx512>(from + 16, count - 16), by) : Avx512::zero();
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }

  // Whole steps: zeros follow `count`. What follows the last step is not written, and must not be read.
  template <class D>
  static void put(Bf16* block, int tokens, int token, int64_t begin, const D* from, int64_t count, float factor) {
    alignas(64) static const uint16_t order[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                   1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    for (int64_t i = 0; i < count; i += kCodes) {
      const int64_t at = begin + i, quarter = at % kChunk / kCodes;
      Bf16* chunk = block + (at / kChunk * tokens + token) * kElements;
      __m512i row;
      if (kSame<D, Bf16> && factor == 1.0f && i + kCodes <= count)
        row = _mm512_loadu_si512(from + i);
      else
        row = row_of(from + i, count - i, factor);
      row = _mm512_permutexvar_epi16(_mm512_load_si512(order), row);
      const __m128i part[4] = {_mm512_castsi512_si128(row), _mm512_extracti32x4_epi32(row, 1),
                               _mm512_extracti32x4_epi32(row, 2), _mm512_extracti32x4_epi32(row, 3)};
      const __m128i ones = _mm_set1_epi16(0x3f80);
      __m128 sum = _mm_setzero_ps();
      for (int v = 0; v < 4; ++v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(chunk + 32 * v + 8 * quarter), part[v]);
        if (kSums) sum = _mm_dpbf16_ps(sum, (__m128bh)part[v], (__m128bh)ones);
      }
      if (kSums) _mm_storeu_ps(reinterpret_cast<float*>(chunk + kChunk) + 4 * quarter, sum);
    }
  }
};

// What of a chunk is there: all of it, or `steps` of its four steps of 32 codes.
struct Part {
  bool whole;
  int steps;

  __m512i codes(const uint8_t* p) const {
    return whole ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((1ull << 16 * steps) - 1, p);
  }
  Avx512Bf16::Pairs inputs(const Bf16* p) const {
    return whole ? Avx512Bf16::load_pairs(p)
                 : (Avx512Bf16::Pairs)_mm512_maskz_loadu_epi16((1u << 8 * steps) - 1, p);
  }
  __m512 sums(const Bf16* p) const {
    return whole ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps((1u << 4 * steps) - 1, p);
  }
  // Four scales, each for a quarter of a vector.
  __m512 scales(const float* p) const {
    const __m512i quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m128 four = whole ? _mm_loadu_ps(p) : _mm_maskz_loadu_ps((1u << steps) - 1, p);
    return _mm512_permutexvar_ps(quarters, _mm512_castps128_ps512(four));
  }
  __m512 scales(const PerChunk* p) const { return _mm512_set1_ps(p->value); }
  // The same from four scales as they are stored: all four into each quarter, of which one byte or two become floats.
  __m512 scales(const Bf16* p) const {
    const __m128i four = whole ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))
                               : _mm_maskz_loadu_epi16((1u << steps) - 1, p);
    const __m512i order = _mm512_setr_epi64(0x0100808001008080, 0x0100808001008080, 0x0302808003028080,
                                            0x0302808003028080, 0x0504808005048080, 0x0504808005048080,
                                            0x0706808007068080, 0x0706808007068080);
    return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_broadcastq_epi64(four), order));
  }
  __m512 scales(const E8m0* p) const {
    const __m128i four = whole ? _mm_castps_si128(_mm_load_ss(reinterpret_cast<const float*>(p)))
                               : _mm_maskz_loadu_epi8((1u << steps) - 1, p);
    const __m512i order = _mm512_setr_epi64(0x0080808000808080, 0x0080808000808080, 0x0180808001808080,
                                            0x0180808001808080, 0x0280808002808080, 0x0280808002808080,
                                            0x0380808003808080, 0x0380808003808080);
    const __m512i bits = _mm512_srli_epi32(_mm512_shuffle_epi8(_mm512_broadcastd_epi32(four), order), 1);
    return _mm512_castsi512_ps(_mm512_max_epu32(bits, _mm512_set1_epi32(1 << 22)));  // 2^-127 is below the normal ones
  }
};

// The scales and zero points of a row from step `step` on: as floats, or as stored.
template <class S>
inline const S* scales_at(const CodeRows& w, int r, int64_t step) {
  return reinterpret_cast<const S*>(w.stored.at + r * w.stored_stride) + step;
}
template <>
inline const float* scales_at<float>(const CodeRows& w, int r, int64_t step) {
  return w.scale + r * w.groups + step;
}
template <>
inline const PerChunk* scales_at<PerChunk>(const CodeRows& w, int r, int64_t step) {
  return reinterpret_cast<const PerChunk*>(w.scale + r * w.groups + step / 4);
}
template <class S>
inline const S* zeros_at(const CodeRows& w, int r, int64_t step) {
  return reinterpret_cast<const S*>(w.stored.at + r * w.stored_stride + w.to_zero) + step;
}
template <>
inline const float* zeros_at<float>(const CodeRows& w, int r, int64_t step) {
  return w.zero + r * w.groups + step;
}
template <>
inline const PerChunk* zeros_at<PerChunk>(const CodeRows& w, int r, int64_t step) {
  return reinterpret_cast<const PerChunk*>(w.zero + r * w.groups + step / 4);
}

// sum + scale * (products - zero * the inputs' sum)
template <bool kSums>
inline __attribute__((always_inline)) __m512 add_group(__m512 sum, __m512 products, __m512 scale, __m512 zero,
                                                       const Bf16* x, const Part& part) {
  if (kSums) products = _mm512_fnmadd_ps(zero, part.sums(x + kChunk), products);
  return _mm512_fmadd_ps(products, scale, sum);
}

template <int kind, class S>
inline __attribute__((always_inline)) __m512 zeros_of(const CodeRows& w, int r, int64_t step, const Part& part) {
  if (kind != kInt4Zero) return _mm512_setzero_ps();
  return _mm512_sub_ps(part.scales(zeros_at<S>(w, r, step)), _mm512_set1_ps(8.0f));
}

template <int kind, class S, int R, int N>
inline __attribute__((always_inline)) void nibble_step(const CodeRows& w, int64_t c, const Part& part, __m512i table,
                                                       const Bf16* x, __m512 (&sum)[R][N]) {
  using V = Avx512Bf16;
  constexpr bool kSums = kind == kInt4Zero;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const __m512i codes = part.codes(w.at + r * w.stride + c * kChunkBytes);
    const V::Pairs weight[4] = {(V::Pairs)_mm512_permutexvar_epi16(codes, table),
                                (V::Pairs)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table),
                                (V::Pairs)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table),
                                (V::Pairs)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table)};
    const auto scale = part.scales(scales_at<S>(w, r, 4 * c));
    const auto zero = zeros_of<kind, S>(w, r, 4 * c, part);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const Bf16* at = x + n * Chunks<kSums>::kElements;
      auto products = V::zero();
#pragma GCC unroll 16
      for (int v = 0; v < 4; ++v) products = V::dot(products, weight[v], part.inputs(at + 32 * v));
      sum[r][n] = add_group<kSums>(sum[r][n], products, scale, zero, at, part);
    }
  }
}

template <int kind, class S, int R, int N>
inline __attribute__((noinline)) void nibble_block(const CodeRows& w, int64_t size, const Bf16* x, float* tile) {
  constexpr int64_t kElements = Chunks<kind == kInt4Zero>::kElements;
  const int64_t steps = ceil_div(size, kCodes), chunks = steps / 4;
  constexpr bool kStored = kSame<S, Bf16> || kSame<S, E8m0>;
  const int64_t distance = rows_ahead(w, R, 16384);  // half a byte is much work: what comes late holds up more
  const uint8_t* ahead = Stretch{w.at, w.end, w.then}.ahead(distance * w.stride);
  const uint8_t* ahead_scales = kStored ? w.stored.ahead(distance * w.stored_stride) : nullptr;
  const __m512i table = bf16_table<kind>();
  __m512 sum[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[r][n] = _mm512_setzero_ps();
  for (int64_t c = 0; c < chunks; ++c) {
    fetch_lines<R>(ahead, c);
    if (kStored) {  // the rows' scales follow each other
      const char* scales = reinterpret_cast<const char*>(ahead_scales) + c * 4 * R * sizeof(S);
      _mm_prefetch(scales, _MM_HINT_T0);
      if (kind == kInt4Zero) _mm_prefetch(scales + w.to_zero, _MM_HINT_T0);
    }
    nibble_step<kind, S, R, N>(w, c, {true, 4}, table, x + c * N * kElements, sum);
  }
  if (steps % 4 != 0)
    nibble_step<kind, S, R, N>(w, chunks, {false, static_cast<int>(steps % 4)}, table, x + chunks * N * kElements, sum);
  store_sums<Avx512Bf16, R, N>(sum, tile);
}

// The same step from R rows of numbers: inputs are loaded once for all rows.
template <int kind, int R, int N>
inline __attribute__((always_inline)) void wide_nibble_step(const Bf16* wide, int64_t stride, const CodeRows& w,
                                                            int64_t c, const Part& part, const Bf16* x,
                                                            __m512 (&sum)[R][N]) {
  using V = Avx512Bf16;
  constexpr bool kSums = kind == kInt4Zero;
  constexpr int64_t kElements = Chunks<kSums>::kElements;
  __m512 products[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) products[r][n] = V::zero();
#pragma GCC unroll 16
  for (int v = 0; v < 4; ++v) {
    V::Pairs weight[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) weight[r] = V::load_pairs(wide + r * stride + 32 * v);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const auto input = V::keep_pairs(part.inputs(x + n * kElements + 32 * v));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) products[r][n] = V::dot(products[r][n], weight[r], input);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const auto scale = part.scales(scales_at<float>(w, r, 4 * c));
    const auto zero = zeros_of<kind, float>(w, r, 4 * c, part);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
      sum[r][n] = add_group<kSums>(sum[r][n], products[r][n], scale, zero, x + n * kElements, part);
  }
}

template <int kind, int N>
inline void wide_nibble_block(const Bf16* wide, int64_t stride, const CodeRows& w, int64_t size, const Bf16* x,
                              float* tile) {
  constexpr int R = 2;
  constexpr int64_t kElements = Chunks<kind == kInt4Zero>::kElements;
  const int64_t steps = ceil_div(size, kCodes), chunks = steps / 4;
  __m512 sum[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[r][n] = _mm512_setzero_ps();
  for (int64_t c = 0; c < chunks; ++c)
    wide_nibble_step<kind, R, N>(wide + c * kChunk, stride, w, c, {true, 4}, x + c * N * kElements, sum);
  if (steps % 4 != 0)
    wide_nibble_step<kind, R, N>(wide + chunks * kChunk, stride, w, chunks, {false, static_cast<int>(steps % 4)},
                                 x + chunks * N * kElements, sum);
  store_sums<Avx512Bf16, R, N>(sum, tile);
}

template <int kind>
struct NibbleCodes {
  using Layout = Chunks<kind == kInt4Zero>;
  using Input = Bf16;
  using Wide = Bf16;
  using Stored = std::conditional_t<kind == kE2m1, E8m0, Bf16>;
  static constexpr bool kBytes = false;
  static constexpr bool repeats(int64_t group, bool widened) { return widened || group != kChunk; }
  static constexpr bool reads_scales(int32_t type, int64_t group) {
    return group == kCodes && type == (kind == kE2m1 ? kScaleE8m0 : kScaleBfloat16);
  }

  static int64_t width(int64_t size) { return Layout::width(size); }
  static int64_t wide_stride(int64_t size) { return round_up(size, kChunk); }

  static void widen(const CodeRows& w, int rows, int64_t size, Bf16* to) {
    const __m512i table = bf16_table<kind>();
    const int64_t steps = ceil_div(size, kCodes), stride = wide_stride(size);
    const uint8_t* ahead = ahead_of(w, rows);
    for (int r = 0; r < rows; ++r)
      for (int64_t c = 0; c * 4 < steps; ++c) {
        const int left = static_cast<int>(min64(4, steps - 4 * c));
        _mm_prefetch(reinterpret_cast<const char*>(ahead + r * w.stride) + c * kChunkBytes, _MM_HINT_T0);
        const __m512i codes = Part{left == 4, left}.codes(w.at + r * w.stride + c * kChunkBytes);
        Bf16* at = to + r * stride + c * kChunk;
        _mm512_storeu_si512(at, _mm512_permutexvar_epi16(codes, table));
        _mm512_storeu_si512(at + 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table));
        _mm512_storeu_si512(at + 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table));
        _mm512_storeu_si512(at + 96, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table));
      }
  }

  template <int N = 1>
  static void dot(int tokens, const CodeRows& w, int rows, int64_t size, const Bf16* x, float* tile) {
    constexpr int R = 4;
    if (tokens == N)
      return for_row_blocks<R>(w, rows, [&](const CodeRows& some, int r) {
        if (some.stored.at != nullptr) return nibble_block<kind, Stored, R, N>(some, size, x, tile + r);
        if (kind != kE2m1 && some.per_group == kChunk / kCodes)
          return nibble_block<kind, PerChunk, R, N>(some, size, x, tile + r);
        nibble_block<kind, float, R, N>(some, size, x, tile + r);
      });
    if constexpr (N < Avx512Bf16::kMaxTokens) dot<N + 1>(tokens, w, rows, size, x, tile);
  }

  template <int N = 1>
  static void dot_wide(int tokens, const Bf16* wide, const CodeRows& w, int rows, int64_t size, const Bf16* x,
                       float* tile) {
    if (tokens == N)
      return for_row_blocks<2>(w, rows, [&](const CodeRows& some, int r) {
        wide_nibble_block<kind, N>(wide + r * wide_stride(size), some.stride == 0 ? 0 : wide_stride(size), some, size, x,
                                   tile + r);
      });
    if constexpr (N < Avx512Bf16::kMaxTokens) dot_wide<N + 1>(tokens, wide, w, rows, size, x, tile);
  }
};

template <>
struct Codes<Avx512Bf16, kInt4> : NibbleCodes<kInt4> {};
template <>
struct Codes<Avx512Bf16, kInt4Zero> : NibbleCodes<kInt4Zero> {};
template <>
struct Codes<Avx512Bf16, kE2m1> : NibbleCodes<kE2m1> {};

}  // namespace
