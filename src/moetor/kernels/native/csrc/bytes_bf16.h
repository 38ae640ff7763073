// The same for codes of a byte: with bfloat16 inputs, and with inputs that are bytes too.
#pragma once

#include "codes_bf16.h"

namespace {

// 32 codes as numbers.
inline Avx512Bf16::Pairs widen_code_bytes(const uint8_t* from) {
  __m512 half[2];
  Avx512::widen_bytes(from, half);
  return (Avx512Bf16::Pairs)_mm512_cvtne2ps_pbh(half[1], half[0]);
}

// 32 weights, from their codes or from rows that are numbers already.
inline Avx512Bf16::Pairs weights_at(const uint8_t* from) { return widen_code_bytes(from); }
inline Avx512Bf16::Pairs weights_at(const Bf16* from) { return Avx512Bf16::load_pairs(from); }

// One step of 32 weights.
template <int R, int N, class W>
inline __attribute__((always_inline)) void byte_step(const W* from, int64_t stride, const Bf16* x,
                                                     __m512 (&sum)[R][N]) {
  using V = Avx512Bf16;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const auto weight = weights_at(from + r * stride);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[r][n] = V::dot(sum[r][n], weight, V::load_pairs(x + n * kCodes));
  }
}

// The sums of a group, times its scale, join the sums of all.
template <int R, int N>
inline __attribute__((always_inline)) void end_group(const CodeRows& w, int64_t group, __m512 (&products)[R][N],
                                                     __m512 (&sum)[R][N]) {
  using V = Avx512Bf16;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      sum[r][n] = V::fma(products[r][n], V::set(w.scale[r * w.groups + group]), sum[r][n]);
      products[r][n] = V::zero();
    }
}

// tile[n][r] = x[n] . w[r], from `rows`, the codes or the numbers of `w`. Without groups the scale waits for the sum.
template <int kind, int R, int N, class W>
inline void byte_block(const CodeRows& w, const W* rows, int64_t stride, int64_t size, const Bf16* x, float* tile) {
  using V = Avx512Bf16;
  constexpr bool kGroups = kind == kInt8, kNumbers = kSame<W, Bf16>;  // rows of numbers end with a whole step
  const uint8_t* ahead = ahead_of(w, R);
  const int64_t whole = kNumbers ? ceil_div(size, kCodes) : size / kCodes;
  __m512 sum[R][N], products[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[r][n] = products[r][n] = V::zero();
  int64_t group = 0, left = w.per_group;
  for (int64_t s = 0; s < whole; ++s) {
    if (!kNumbers && s % 2 == 0) fetch_lines<R>(ahead, s / 2);
    byte_step<R, N>(rows + s * kCodes, stride, x + s * N * kCodes, products);
    if (kGroups && --left == 0) {
      end_group<R, N>(w, group++, products, sum);
      left = w.per_group;
    }
  }
  if (whole * kCodes < size) {  // a row of bytes may end within a step
    uint8_t rest[R * kCodes] = {};
    for (int r = 0; r < R; ++r) memcpy(rest + r * kCodes, w.at + r * w.stride + whole * kCodes, size - whole * kCodes);
    byte_step<R, N>(rest, kCodes, x + whole * N * kCodes, products);
  }
  if (kGroups && (left < w.per_group || whole * kCodes < size)) end_group<R, N>(w, group, products, sum);
  store_sums<V, R, N>(kGroups ? sum : products, tile);
}

template <int kind>
struct ByteCodes {
  using Layout = Steps<Avx512Bf16>;
  using Input = Bf16;
  using Wide = Bf16;
  static constexpr bool kBytes = false;
  static constexpr bool repeats(int64_t, bool) { return false; }
  static constexpr bool reads_scales(int32_t, int64_t) { return false; }

  static int64_t width(int64_t size) { return Layout::width(size); }

  static void widen(const CodeRows& w, int rows, int64_t size, Bf16* to) {
    const int64_t stride = round_up(size, kCodes);
    const uint8_t* ahead = ahead_of(w, rows);
    for (int r = 0; r < rows; ++r)
      for (int64_t s = 0; s * kCodes < size; ++s) {
        const uint8_t* from = w.at + r * w.stride + s * kCodes;
        uint8_t rest[kCodes] = {};
        if ((s + 1) * kCodes > size) {
          memcpy(rest, from, size - s * kCodes);
          from = rest;
        }
        if (s % 2 == 0)
          _mm_prefetch(reinterpret_cast<const char*>(ahead + r * w.stride) + s * kCodes, _MM_HINT_T0);
        _mm512_storeu_si512(to + r * stride + s * kCodes, (__m512i)widen_code_bytes(from));
      }
  }

  template <int N = 1>
  static void dot(int tokens, const CodeRows& w, int rows, int64_t size, const Bf16* x, float* tile) {
    constexpr int R = kind == kInt8 ? 2 : 4;
    if (tokens == N)
      return for_row_blocks<R>(w, rows, [&](const CodeRows& some, int r) {
        byte_block<kind, R, N>(some, some.at, some.stride, size, x, tile + r);
      });
    if constexpr (N < Avx512Bf16::kMaxTokens) dot<N + 1>(tokens, w, rows, size, x, tile);
  }

  template <int N = 1>
  static void dot_wide(int tokens, const Bf16* wide, const CodeRows& w, int rows, int64_t size, const Bf16* x,
                       float* tile) {
    const int64_t stride = round_up(size, kCodes);
    if (kind == kInt8Row)
      return dot_panel_of<Avx512Bf16, Bf16>(tokens, wide, stride, rows, size, x, tile, {wide, 0, 1, 0});
    if (tokens == N)
      return for_row_blocks<2>(w, rows, [&](const CodeRows& some, int r) {
        byte_block<kind, 2, N>(some, wide + r * stride, some.stride == 0 ? 0 : stride, size, x, tile + r);
      });
    if constexpr (N < Avx512Bf16::kMaxTokens) dot_wide<N + 1>(tokens, wide, w, rows, size, x, tile);
  }
};

template <>
struct Codes<Avx512Bf16, kInt8> : ByteCodes<kInt8> {};
template <>
struct Codes<Avx512Bf16, kInt8Row> : ByteCodes<kInt8Row> {};

// --- bytes times bytes ---------------------------------------------------------------------------------------------------

constexpr int kInt8Bytes = 100;  // kInt8Row with inputs that are bytes; known here alone

// What stands before a row's bytes.
struct RoundedRow {
  float scale;
  int32_t sum;  // 128 times the sum of its bytes: what is too much when codes count from 0 to 255
};

// The four horizontal sums.
inline __m128i sum4(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti32x8_epi32(abcd, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// sum += the products of unsigned and signed bytes, four to a place. Not the intrinsic: GCC 12 then keeps sums in memory
// where blocks have many.
inline __attribute__((always_inline)) void add_products(__m512i& sum, __m512i weights, __m512i inputs) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs));
}

template <int R, int N>
inline __attribute__((always_inline)) void bytes_step(const uint8_t* from, int64_t stride, __mmask64 there,
                                                      const int8_t* x, __m512i (&sum)[R][N]) {
  const __m512i flip = _mm512_set1_epi8(-128);
  __m512i weight[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    weight[r] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, from + r * stride), flip);
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
    const __m512i input = _mm512_loadu_si512(x + n * 64);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) add_products(sum[r][n], weight[r], input);
  }
}

// tile[n][r] = x[n] . w[r] without the scale of the row.
template <int R, int N>
inline __attribute__((noinline)) void bytes_block(const CodeRows& w, int64_t size, const int8_t* x, float* tile) {
  constexpr int kBytes = 64;
  const uint8_t* ahead = ahead_of(w, R);
  const int8_t* inputs = x + N * kBytes;
  const int64_t steps = size / kBytes;
  __m512i sum[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[r][n] = _mm512_setzero_si512();
  for (int64_t s = 0; s < steps; ++s) {
    fetch_lines<R>(ahead, s);
    bytes_step<R, N>(w.at + s * kBytes, w.stride, ~0ull, inputs + s * N * kBytes, sum);
  }
  if (const int64_t rest = size % kBytes; rest != 0)  // a row may end within a step
    bytes_step<R, N>(w.at + steps * kBytes, w.stride, (1ull << rest) - 1, inputs + steps * N * kBytes, sum);
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
    RoundedRow row;
    memcpy(&row, x + n * kBytes, sizeof(row));
    const __m128i four = _mm_sub_epi32(sum4(sum[0][n], sum[1][n], sum[2][n], sum[3][n]), _mm_set1_epi32(row.sum));
    _mm_storeu_ps(tile + n * kTile, _mm_mul_ps(_mm_cvtepi32_ps(four), _mm_set1_ps(row.scale)));
  }
}

template <>
struct Codes<Avx512Bf16, kInt8Bytes> {
  using Layout = Steps<Avx512>;  // of what is rounded: rows of floats
  using Input = int8_t;
  using Wide = int8_t;
  static constexpr bool kBytes = true;
  static constexpr bool repeats(int64_t, bool) { return false; }
  static constexpr bool reads_scales(int32_t, int64_t) { return false; }

  static int64_t width(int64_t size) { return rounded_width(size); }

  // Rounds a row to s * q, s = max |x| / 127 and q a whole number within +-127.
  static void round(const float* row, int64_t size, int8_t* block, int tokens, int token) {
    const int64_t vectors = ceil_div(size, 16);
    auto most = Avx512::zero();
    for (int64_t i = 0; i < vectors; ++i) most = Avx512::max(most, Avx512::abs(Avx512::load(row + 16 * i)));
    float lanes[16];
    Avx512::store(lanes, most);
    float largest = 0.0f;
    for (const float lane : lanes) largest = lane > largest || lane != lane ? lane : largest;
    const float scale = largest > 0.0f || largest != largest ? largest / 127.0f : 1.0f;
    const auto by = Avx512::set(scale);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < round_up(vectors, 4); ++i) {
      int8_t* to = block + 64 * tokens + (i / 4 * tokens + token) * 64 + i % 4 * 16;
      __m512i q = _mm512_setzero_si512();
      if (i < vectors) {
        const auto v = Avx512::round(Avx512::div(Avx512::load(row + 16 * i), by));
        q = _mm512_cvtps_epi32(Avx512::min(Avx512::set(127.0f), Avx512::max(Avx512::set(-127.0f), v)));
      }
      sum = _mm512_add_epi32(sum, q);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(q));
    }
    const RoundedRow head{scale, 128 * _mm512_reduce_add_epi32(sum)};
    memcpy(block + 64 * token, &head, sizeof(head));
  }

  static void widen(const CodeRows&, int, int64_t, int8_t*) {}
  static void dot_wide(int, const int8_t*, const CodeRows&, int, int64_t, const int8_t*, float*) {}

  template <int N = 1>
  static void dot(int tokens, const CodeRows& w, int rows, int64_t size, const int8_t* x, float* tile) {
    constexpr int R = 4;
    if (tokens == N)
      return for_row_blocks<R>(w, rows, [&](const CodeRows& some, int r) {
        bytes_block<R, N>(some, size, x, tile + r);
      });
    if constexpr (N < Avx512Bf16::kMaxTokens) dot<N + 1>(tokens, w, rows, size, x, tile);
  }
};

}  // namespace
