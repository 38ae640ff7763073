// The experts with quantised weights: codes of one byte or half a byte, widened in registers as they are read.
//
// A weight is scale * code, or scale * (code - zero), in float32; a sum adds weight * input in the order of the plain
// kernel. So a token's bits depend neither on the other tokens nor on how the work was cut.
#pragma once

#include "experts.h"

namespace {

constexpr int kCodes = 32;  // codes that are widened together
template <int kind>
constexpr int kStepBytes = kind == kInt8 || kind == kInt8Row ? 32 : 16;

// Sixteen numbers that the codes of half a byte stand for: their values, less 8 where there are no zero points, or twice
// their e2m1 numbers.
template <int kind>
inline const float* nibble_table() {
  alignas(64) static const float plain[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  alignas(64) static const float centred[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  alignas(64) static const float e2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, -0.0f, -1, -2, -3, -4, -6, -8, -12};
  return kind == kInt4 ? centred : kind == kE2m1 ? e2m1 : plain;
}

// Rows of one expert's matrix, and their scales and zero points as floats.
struct CodeRows {
  const uint8_t* at;
  int64_t stride;  // bytes
  const float *scale, *zero;
  int64_t groups;     // floats from a row's scales to those of the next
  int64_t per_group;  // steps of 32 codes that share a scale
};

// 32 weights of a row, from the codes at `from` in the group `group`.
template <class V, int kind>
inline __attribute__((always_inline)) void widen_codes(const uint8_t* from, const CodeRows& w, int64_t group, int r,
                                                       typename V::Reg* to) {
  constexpr int kRegs = kCodes / V::kWidth;
  if (kind == kInt8Row) return V::widen_bytes(from, to);  // its scale is the same for all: it waits for the sum
  const auto scale = V::set(w.scale[r * w.groups + group]);
  if (kind == kInt8) {
    V::widen_bytes(from, to);
#pragma GCC unroll 16
    for (int i = 0; i < kRegs; ++i) to[i] = V::mul(to[i], scale);
    return;
  }
  // Sixteen numbers are scaled, not thirty-two weights: the same products, found in a table.
  typename V::Reg table[16 / V::kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < 16 / V::kWidth; ++i) {
    table[i] = V::load(nibble_table<kind>() + i * V::kWidth);
    if (kind == kInt4Zero) table[i] = V::sub(table[i], V::set(w.zero[r * w.groups + group]));
    table[i] = V::mul(table[i], scale);
  }
  V::widen_nibbles(from, table, to);
}

// One step of 32 codes of R rows for N inputs.
template <class V, int kind, int R, int N>
inline __attribute__((always_inline)) void code_step(const uint8_t* from, int64_t stride, const CodeRows& w,
                                                     int64_t group, const float* x, typename V::Reg (&sum)[R][N]) {
  constexpr int W = V::kWidth, kStep = 2 * W, kRegs = kCodes / W;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    typename V::Reg weight[kRegs];
    widen_codes<V, kind>(from + r * stride, w, group, r, weight);
#pragma GCC unroll 16
    for (int i = 0; i < kRegs; ++i)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n)
        sum[r][n] = V::fma(weight[i], V::load(x + (i / 2 * N + n) * kStep + i % 2 * W), sum[r][n]);
  }
}

// tile[n][r] = x[n] . w[r] for R rows and N inputs of `size` values.
template <class V, int kind, int R, int N>
inline void code_block(const CodeRows& w, int64_t size, const float* x, float* tile, const uint8_t* ahead) {
  constexpr int kBytes = kStepBytes<kind>;
  constexpr bool kWhole = kBytes == 16;  // packed codes fill whole steps
  typename V::Reg sum[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[r][n] = V::zero();
  const int64_t steps = kWhole ? ceil_div(size, kCodes) : size / kCodes;
  int64_t group = 0, left = w.per_group;
  for (int64_t s = 0; s < steps; ++s) {
    if (s * kBytes % kCacheLine == 0)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        _mm_prefetch(reinterpret_cast<const char*>(ahead + r * w.stride) + s * kBytes, _MM_HINT_T0);
    code_step<V, kind, R, N>(w.at + s * kBytes, w.stride, w, group, x + s * N * kCodes, sum);
    if (--left == 0) {
      left = w.per_group;
      ++group;
    }
  }
  if (!kWhole && steps * kCodes < size) {  // a row of bytes may end within a step
    uint8_t rest[R * kCodes] = {};
    for (int r = 0; r < R; ++r) memcpy(rest + r * kCodes, w.at + r * w.stride + steps * kCodes, size - steps * kCodes);
    code_step<V, kind, R, N>(rest, kCodes, w, group, x + steps * N * kCodes, sum);
  }
  store_sums<V, R, N>(sum, tile);
}

// The same for up to 32 rows; `next` is what is read after them.
template <class V, int kind, int N>
void code_panel(const CodeRows& w, int rows, int64_t size, const float* x, float* tile, const uint8_t* next) {
  constexpr int R = V::rows(N);
  if (rows < R) {  // fewer rows than a block has: each one alone, R times over
    for (int r = 0; r < rows; ++r) {
      const CodeRows one{w.at + r * w.stride, 0, w.scale + r * w.groups, w.zero + r * w.groups, 0, w.per_group};
      code_block<V, kind, R, N>(one, size, x, tile + r, one.at);
    }
    return;
  }
  for (int top = 0; top < rows; top += R) {
    const int r = top + R <= rows ? top : rows - R;  // the last block may step back
    const CodeRows here{w.at + r * w.stride,   w.stride, w.scale + r * w.groups,
                        w.zero + r * w.groups, w.groups, w.per_group};
    code_block<V, kind, R, N>(here, size, x, tile + r, top + 2 * R <= rows ? here.at + R * w.stride : next);
  }
}

template <class V, int kind, int N = 1>
inline void code_panel_of(int tokens, const CodeRows& w, int rows, int64_t size, const float* x, float* tile,
                          const uint8_t* next) {
  if (tokens == N) return code_panel<V, kind, N>(w, rows, size, x, tile, next);
  if constexpr (N < V::kMaxTokens) code_panel_of<V, kind, N + 1>(tokens, w, rows, size, x, tile, next);
}

// Widens up to 32 rows into floats, `stride` from row to row: the weights that `code_step` has in its registers.
template <class V, int kind>
void widen_panel(const CodeRows& w, int rows, int64_t size, float* to, int64_t stride) {
  constexpr int kBytes = kStepBytes<kind>, kRegs = kCodes / V::kWidth;
  for (int r = 0; r < rows; ++r)
    for (int64_t s = 0; s * kCodes < size; ++s) {
      const uint8_t* from = w.at + r * w.stride + s * kBytes;
      uint8_t rest[kCodes] = {};
      if (kBytes == kCodes && (s + 1) * kCodes > size) {  // a row of bytes may end within a step
        memcpy(rest, from, size - s * kCodes);
        from = rest;
      }
      typename V::Reg weight[kRegs];
      widen_codes<V, kind>(from, w, s / w.per_group, r, weight);
      for (int i = 0; i < kRegs; ++i) V::store(to + r * stride + s * kCodes + i * V::kWidth, weight[i]);
    }
}

template <class V, class D, int kind>
class QuantizedExperts : public Experts<V, D> {
  using Base = Experts<V, D>;
  using typename Base::Blocks;
  using typename Base::Cursor;
  using typename Base::UpTask;
  using Base::a;
  using Base::p;

 public:
  using Base::Base;

  // Runs in every thread of a team.
  void run() {
    const int team = omp_get_num_threads();
    Cursor at;
    at.thread = omp_get_thread_num();
    int64_t task = this->take();
    this->seek(at, task);
    while (task < this->up_tasks_) {
      const UpTask now = at.task;
      task = this->take();
      this->seek(at, task);
      up(now, at);
    }
    if (team > 1) GOMP_barrier();
    if (a.round_inputs) {
      for (int64_t n = at.thread; n < p.num_active; n += team) round_activations(p.active[n]);
      if (team > 1) GOMP_barrier();
    }
    while (task < this->up_tasks_ + this->down_tasks_) {
      const int64_t now = task - this->up_tasks_;
      task = this->take();
      this->down(now, [&](int64_t n, int64_t begin, int64_t end) { add(p.active[n], begin, end, at.thread); });
    }
  }

 private:
  struct Matrix {
    const void *values, *scales, *zeros;
    int64_t expert_stride, stride, rows, depth;
    int32_t scale_type;
  };
  Matrix first_product() const {
    return {a.gate_up,        a.gate_up_scales, a.gate_up_zeros, a.gate_up_expert_stride,
            a.gate_up_stride, this->parts_ * a.intermediate_size, a.hidden_size,
            a.gate_up_scale_type};
  }
  Matrix second_product() const {
    return {a.down,        a.down_scales, a.down_zeros, a.down_expert_stride,
            a.down_stride, a.hidden_size, a.intermediate_size, a.down_scale_type};
  }

  // `count` scales or zero points from place `from` on, as floats.
  static void widen_scales(const void* scales, int32_t type, int64_t from, int64_t count, float factor, float* to) {
    switch (type) {
      case kScaleFloat32: return widen_row<V>(to, static_cast<const float*>(scales) + from, count, factor);
      case kScaleBfloat16: return widen_row<V>(to, static_cast<const Bf16*>(scales) + from, count, factor);
      case kScaleFloat16: return widen_row<V>(to, static_cast<const Fp16*>(scales) + from, count, factor);
      default:
        for (int64_t i = 0; i < count; ++i) {
          const uint32_t e = static_cast<const uint8_t*>(scales)[from + i];
          const uint32_t bits = e == 0 ? 1u << 22 : e << 23;  // 2^-127 is below the normal numbers
          memcpy(to + i, &bits, sizeof(bits));
          to[i] *= factor;
        }
    }
  }

  // Rows [row, row + rows) of an expert's matrix; their scales go into the thread's own memory, of which each of two
  // parts has a half.
  CodeRows code_rows(const Matrix& m, int64_t expert, int64_t row, int rows, int thread, int part) const {
    const int64_t multiple = max64(a.group, kStepBytes<kind> == 16 ? kCodes : 1);
    const int64_t groups = a.group == 0 ? 1 : round_up(m.depth, multiple) / a.group;
    const int64_t from = (expert * m.rows + row) * groups, count = rows * groups;
    float* scale = p.strips + thread * p.strip_floats + 2 * part * p.scale_floats;
    float* zero = scale + p.scale_floats;
    const float factor = kind == kE2m1 ? 0.5f : 1.0f;  // its table holds twice the numbers
    widen_scales(m.scales, m.scale_type, from, count, factor, scale);
    if (kind == kInt4Zero) widen_scales(m.zeros, m.scale_type, from, count, 1.0f, zero);
    const auto* at = static_cast<const uint8_t*>(m.values) + expert * m.expert_stride + row * m.stride;
    return {at, m.stride, scale, zero, groups, a.group == 0 ? INT64_MAX : a.group / kCodes};
  }

  // tile[n][r] = x[n] . w[r]; from `widened` where that holds the rows as floats. Both ways make the same bits.
  void dot(const CodeRows& w, const float* widened, int tokens, int rows, int64_t size, const float* x, float* tile,
           const uint8_t* next) const {
    if (widened == nullptr)
      code_panel_of<V, kind>(tokens, w, rows, size, x, tile, next);
    else
      dot_panel_of<V, float>(tokens, widened, round_up(size, kCodes), rows, size, x, tile, {widened, 0, 1, 0});
    if (kind != kInt8Row) return;
    for (int n = 0; n < tokens; ++n)
      for (int r = 0; r < rows; ++r) tile[n * kTile + r] *= w.scale[r];
  }

  // Where rows that several blocks of tokens pass over are widened once, or null where they are widened in passing.
  float* widened(const CodeRows& w, int64_t passes, int rows, int64_t size, int thread, int part) const {
    const int64_t stride = round_up(size, kCodes);
    if (passes < 2 || p.widened_floats < kPanel * stride) return nullptr;
    float* to = p.strips + thread * p.strip_floats + p.strip_floats - (2 - part) * p.widened_floats;
    widen_panel<V, kind>(w, rows, size, to, stride);
    return to;
  }

  void up(const UpTask& task, Cursor& at) const {
    const Blocks blocks(this->slots_of(task.expert));
    const Matrix m = first_product();
    alignas(64) float tile[2][V::kMaxTokens * kTile] = {};
    const float* packed = this->pack(task, blocks, at);
    for (int64_t i = task.begin; i < task.end; i += kPanel) {
      const int rows = static_cast<int>(min64(kPanel, task.end - i));
      CodeRows parts[2]{};
      const float* wide[2]{};
      for (int part = 0; part < this->parts_; ++part) {
        parts[part] = code_rows(m, task.expert, i + part * a.intermediate_size, rows, at.thread, part);
        wide[part] = widened(parts[part], task.bottom - task.top, rows, a.hidden_size, at.thread, part);
      }
      for (int64_t block = task.top; block < task.bottom; ++block) {
        const int64_t first = blocks.first(block);
        const int tokens = blocks.size(block);
        const float* x = packed + (first - task.first) * p.ldx;
        for (int part = 0; part < this->parts_; ++part) {
          const uint8_t* next = part + 1 < this->parts_ ? parts[1].at : parts[0].at + rows * m.stride;
          dot(parts[part], wide[part], tokens, rows, a.hidden_size, x, tile[part], next);
        }
        float* h = p.h + (p.offsets[task.expert] + first) * p.ldh;
        for (int n = 0; n < tokens; ++n)
          this->finish_up(tile[0] + n * kTile, tile[1] + n * kTile, task.expert, i, rows, h, tokens, n);
      }
    }
  }

  void round_activations(int64_t expert) const {
    const Blocks blocks(this->slots_of(expert));
    for (int64_t block = 0; block < blocks.count; ++block)
      for (int n = 0; n < blocks.size(block); ++n)
        round_row<V>(p.h + (p.offsets[expert] + blocks.first(block)) * p.ldh, blocks.size(block), n,
                     a.intermediate_size);
  }

  // Adds an expert's share of the output's columns [begin, end).
  void add(int64_t expert, int64_t begin, int64_t end, int thread) const {
    const Blocks blocks(this->slots_of(expert));
    const Matrix m = second_product();
    alignas(64) float tile[V::kMaxTokens * kTile] = {};
    for (int64_t row = begin; row < end; row += kPanel) {
      const int rows = static_cast<int>(min64(kPanel, end - row));
      const CodeRows w = code_rows(m, expert, row, rows, thread, 0);
      const float* wide = widened(w, blocks.count, rows, a.intermediate_size, thread, 0);
      for (int64_t block = 0; block < blocks.count; ++block) {
        const int64_t first = blocks.first(block);
        const int tokens = blocks.size(block);
        const float* x = p.h + (p.offsets[expert] + first) * p.ldh;
        dot(w, wide, tokens, rows, a.intermediate_size, x, tile, w.at + rows * m.stride);
        for (int n = 0; n < tokens; ++n) this->finish_down(tile + n * kTile, expert, first + n, row, rows, true);
      }
    }
  }
};

using Start = void (*)(void (*)(void*), void*, int);

template <class Run>
int run_experts(const MoetorExperts& args, const Plan& plan, Start start) {
  Run experts(args, plan);
  start([](void* self) { static_cast<Run*>(self)->run(); }, &experts, args.threads);
  return kOk;
}

template <class V, class D>
int run_weights(const MoetorExperts& args, const Plan& plan, Start start) {
  switch (args.weights) {
    case kPlain: return run_experts<Experts<V, D>>(args, plan, start);
    case kInt8: return run_experts<QuantizedExperts<V, D, kInt8>>(args, plan, start);
    case kInt8Row: return run_experts<QuantizedExperts<V, D, kInt8Row>>(args, plan, start);
    case kInt4: return run_experts<QuantizedExperts<V, D, kInt4>>(args, plan, start);
    case kInt4Zero: return run_experts<QuantizedExperts<V, D, kInt4Zero>>(args, plan, start);
    case kE2m1: return run_experts<QuantizedExperts<V, D, kE2m1>>(args, plan, start);
    default: return kBadDtype;
  }
}

// The entry of one instruction set.
template <class V>
int run_dtype(const MoetorExperts& args, const Plan& plan, Start start) {
  switch (args.dtype) {
    case kFloat32: return run_weights<V, float>(args, plan, start);
    case kBfloat16: return run_weights<V, Bf16>(args, plan, start);
    case kFloat16: return run_weights<V, Fp16>(args, plan, start);
    default: return kBadDtype;
  }
}

}  // namespace
