// The experts with quantised weights, and the entry of one instruction set.
#pragma once

#include "codes.h"
#include "experts.h"

namespace {

template <class V, class D, int kind>
class QuantizedExperts : public Experts<V, D, typename Codes<V, kind>::Layout> {
  using C = Codes<V, kind>;
  using Base = Experts<V, D, typename C::Layout>;
  using Input = typename C::Input;
  using Wide = typename C::Wide;
  using typename Base::Blocks;
  using typename Base::Cursor;
  using typename Base::UpTask;
  using Base::a;
  using Base::p;

 public:
  QuantizedExperts(const MoetorExperts& args, const Plan& plan) : Base(args, plan) { this->h_in_rows_ = C::kBytes; }

  // Runs in every thread of a team.
  void run() {
    const int team = omp_get_num_threads();
    Cursor at;
    at.thread = omp_get_thread_num();
    int64_t task = this->take(at);
    this->seek(at, task);
    while (task < this->up_tasks_) {
      const UpTask now = at.task;
      task = this->take(at);
      this->seek(at, task);
      up(now, at, task);
    }
    if (team > 1) GOMP_barrier();
    if (a.round_inputs) {
      for (int64_t n = at.thread; n < p.num_active; n += team) round_activations(p.active[n]);
      if (team > 1) GOMP_barrier();
    }
    while (task < this->up_tasks_ + this->down_tasks_) {
      const int64_t now = task - this->up_tasks_;
      task = this->take(at);
      this->down(now, [&](int64_t n, int64_t begin, int64_t end) {
        add(p.active[n], begin, end, at.thread,
            n + 1 < p.num_active ? Place{second_product(), p.active[n + 1], begin} : start_of(at, task, 0));
      });
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

  // Groups of a row.
  int64_t groups_in(const Matrix& m) const {
    const int64_t multiple = max64(a.group, kStepBytes<kind> == 16 ? kCodes : 1);
    return a.group == 0 ? 1 : round_up(m.depth, multiple) / a.group;
  }
  static const uint8_t* row_of(const Matrix& m, int64_t expert, int64_t row) {
    return static_cast<const uint8_t*>(m.values) + expert * m.expert_stride + row * m.stride;
  }
  struct Place {  // a row of an expert's matrix
    Matrix matrix;
    int64_t expert, row;
  };
  static const uint8_t* row_of(const Place& at) { return row_of(at.matrix, at.expert, at.row); }
  // Where the first product (0: gate, 1: up) or, after it, the second one begins to read for a task that the cursor is at.
  Place start_of(const Cursor& at, int64_t task, int part) const {
    if (task < this->up_tasks_)
      return {first_product(), at.task.expert, at.task.begin + part * a.intermediate_size};
    const int64_t row = (task - this->up_tasks_) * this->down_width_;
    return {second_product(), p.active[0], row < a.hidden_size ? row : 0};
  }

  // `count` scales or zero points from place `from` on, as floats; the first is for place `from`.
  static void widen_scales(const void* scales, int32_t type, int64_t from, int64_t count, float* to) {
    switch (type) {
      case kScaleFloat32: return widen_row<V>(to, static_cast<const float*>(scales) + from, count, 1.0f);
      case kScaleBfloat16: return widen_row<V>(to, static_cast<const Bf16*>(scales) + from, count, 1.0f);
      case kScaleFloat16: return widen_row<V>(to, static_cast<const Fp16*>(scales) + from, count, 1.0f);
      default:
        for (int64_t i = 0; i < count; ++i) {
          const uint32_t e = static_cast<const uint8_t*>(scales)[from + i];
          const uint32_t bits = e == 0 ? 1u << 22 : e << 23;  // 2^-127 is below the normal numbers
          memcpy(to + i, &bits, sizeof(bits));
        }
    }
  }

  // Bytes of a row's scales, and where those of a row lie.
  int64_t scale_bytes(const Matrix& m) const {
    static constexpr int64_t kSizes[] = {4, 2, 2, 1};
    return groups_in(m) * kSizes[m.scale_type];
  }
  const uint8_t* scales_of(const Matrix& m, int64_t expert, int64_t row) const {
    return static_cast<const uint8_t*>(m.scales) + (expert * m.rows + row) * scale_bytes(m);
  }
  static int64_t to_zeros(const Matrix& m) {  // from a scale to its zero point
    return kind == kInt4Zero ? static_cast<const uint8_t*>(m.zeros) - static_cast<const uint8_t*>(m.scales) : 0;
  }

  // Fetches the scales and zero points of the panel at `panel`: a stream of their own, too short for the processor to
  // notice.
  void fetch_scales(const Place& panel) const {
    const Matrix& m = panel.matrix;
    const uint8_t* const from = scales_of(m, panel.expert, panel.row);
    const uint8_t* const to = from + min64(kPanel, m.rows - panel.row) * scale_bytes(m);
    for (const uint8_t* at = from; at < to; at += kCacheLine) {
      _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
      if (kind == kInt4Zero) _mm_prefetch(reinterpret_cast<const char*>(at + to_zeros(m)), _MM_HINT_T0);
    }
  }

  // Scales of groups become scales of steps of 32 codes, in place.
  static void repeat_scales(float* scales, int64_t groups, int64_t times) {
    for (int64_t g = groups - 1; g >= 0; --g)
      for (int64_t i = 0; i < times; ++i) scales[g * times + i] = scales[g];
  }

  // Rows [row, row + rows) of an expert's matrix, of which this thread reads those before `end` and then the ones at
  // `then`. Their scales are read as they are stored where the products can do that, unless rows are widened; else they
  // go into the thread's own memory, of which each of two parts has a half.
  CodeRows code_rows(const Matrix& m, int64_t expert, int64_t row, int rows, int64_t end, const Place& then,
                     int64_t passes, int thread, int part) const {
    const int64_t groups = groups_in(m);
    const uint8_t* const at = row_of(m, expert, row);
    CodeRows w{at, m.stride, nullptr, nullptr, groups, 1, row_of(m, expert, end), row_of(then), {}, 0, 0};
    if (C::reads_scales(m.scale_type, a.group) && !widens(passes)) {
      w.stored = {scales_of(m, expert, row), scales_of(m, expert, end),
                  scales_of(then.matrix, then.expert, then.row)};
      w.stored_stride = scale_bytes(m);
      w.to_zero = to_zeros(m);
      return w;
    }
    // The next rows'.
    fetch_scales(row + kPanel < end ? Place{m, expert, row + kPanel} : then);
    const int64_t from = (expert * m.rows + row) * groups, count = rows * groups;
    float* scale = p.strips + thread * p.strip_floats + 2 * part * p.scale_floats;
    float* zero = scale + p.scale_floats;
    widen_scales(m.scales, m.scale_type, from, count, scale);
    if (kind == kInt4Zero) widen_scales(m.zeros, m.scale_type, from, count, zero);
    const int64_t times = a.group / kCodes;
    const bool repeat = times > 1 && C::repeats(a.group, widens(passes));
    if (repeat) repeat_scales(scale, count, times);
    if (repeat && kind == kInt4Zero) repeat_scales(zero, count, times);
    w.scale = scale;
    w.zero = zero;
    w.groups = repeat ? groups * times : groups;
    w.per_group = a.group == 0 ? INT64_MAX : repeat ? 1 : times;
    return w;
  }

  // tile[n][r] = x[n] . w[r]; from `wide` where that holds the rows widened. Both ways make the same bits.
  static void dot(const CodeRows& w, const Wide* wide, int tokens, int rows, int64_t size, const Input* x, float* tile) {
    wide == nullptr ? C::dot(tokens, w, rows, size, x, tile) : C::dot_wide(tokens, wide, w, rows, size, x, tile);
    if (!C::kBytes && kind != kInt8Row) return;
    for (int n = 0; n < tokens; ++n)
      for (int r = 0; r < rows; ++r) tile[n * kTile + r] *= w.scale[r];
  }

  bool widens(int64_t passes) const { return passes >= 2 && p.widened_floats != 0; }

  // Where rows that several blocks of tokens pass over are widened once, or null where they are widened in passing.
  Wide* widened(const CodeRows& w, int64_t passes, int rows, int64_t size, int thread, int part) const {
    if (!widens(passes)) return nullptr;
    float* to = p.strips + thread * p.strip_floats + p.strip_floats - (2 - part) * p.widened_floats;
    C::widen(w, rows, size, reinterpret_cast<Wide*>(to));
    return reinterpret_cast<Wide*>(to);
  }

  // The inputs of a task; as bytes, by way of a row of floats, where products are of bytes.
  Input* inputs(const UpTask& task, const Blocks& blocks, Cursor& at) const {
    if constexpr (C::kBytes) {
      float* row = p.packed + (at.thread + 1) * p.packed_floats - p.ldx;
      const int64_t width = C::width(a.hidden_size);
      return this->template pack<Input>(task, blocks, at, width, [&](int64_t slot, Input* block, int tokens, int token) {
        this->pack_input(task, slot, row, 1, 0);
        C::round(row, a.hidden_size, block, tokens, token);
      });
    } else {
      return this->pack(task, blocks, at);
    }
  }
  // The activations of an expert's slots from `slot` on, as the second product wants them.
  const Input* activations_of(int64_t expert, int64_t slot) const {
    if constexpr (C::kBytes)
      return reinterpret_cast<Input*>(p.rounded) + (p.offsets[expert] + slot) * C::width(a.intermediate_size);
    else
      return this->activations(expert, slot);
  }

  void up(const UpTask& task, Cursor& at, int64_t next_task) const {
    const Blocks blocks(this->slots_of(task.expert));
    const Matrix m = first_product();
    alignas(64) float tile[2][V::kMaxTokens * kTile] = {};
    const Input* packed = inputs(task, blocks, at);
    const int64_t width = C::width(a.hidden_size);
    if (this->in_runs(task)) {
      return this->finish_runs(task, [&](int part, int64_t i, int rows, float* sums) {
        const int64_t before = part * a.intermediate_size;
        const Place up{m, task.expert, a.intermediate_size + task.begin};
        const CodeRows w = code_rows(m, task.expert, before + i, rows, before + task.end,
                                     part + 1 < this->parts_ ? up : start_of(at, next_task, 0), 1, at.thread, part);
        dot(w, nullptr, static_cast<int>(task.tokens), rows, a.hidden_size, packed, sums);
      });
    }
    for (int64_t i = task.begin; i < task.end; i += kPanel) {
      const int rows = static_cast<int>(min64(kPanel, task.end - i));
      CodeRows parts[2]{};
      const Wide* wide[2]{};
      for (int part = 0; part < this->parts_; ++part) {
        const int64_t before = part * a.intermediate_size, passes = task.bottom - task.top;
        parts[part] = code_rows(m, task.expert, before + i, rows, before + task.end, start_of(at, next_task, part),
                                passes, at.thread, part);
        wide[part] = widened(parts[part], passes, rows, a.hidden_size, at.thread, part);
      }
      for (int64_t block = task.top; block < task.bottom; ++block) {
        const int64_t first = blocks.first(block);
        const int tokens = blocks.size(block);
        const Input* x = packed + (first - task.first) * width;
        for (int part = 0; part < this->parts_; ++part)
          dot(parts[part], wide[part], tokens, rows, a.hidden_size, x, tile[part]);
        this->finish_panel(tile[0], tile[1], task.expert, first, tokens, i, rows);
      }
    }
  }

  void round_activations(int64_t expert) const {
    const Blocks blocks(this->slots_of(expert));
    for (int64_t block = 0; block < blocks.count; ++block)
      for (int n = 0; n < blocks.size(block); ++n) {
        const int64_t first = blocks.first(block), size = a.intermediate_size;
        if constexpr (C::kBytes)
          C::round(this->activations(expert, first + n), size, const_cast<Input*>(activations_of(expert, first)),
                   blocks.size(block), n);
        else if constexpr (kSame<Input, float>)
          round_row<V>(this->activations(expert, first), blocks.size(block), n, size);
      }
  }

  // Adds an expert's share of the output's columns [begin, end); `then` is what is read after it.
  void add(int64_t expert, int64_t begin, int64_t end, int thread, const Place& then) const {
    const Blocks blocks(this->slots_of(expert));
    const Matrix m = second_product();
    alignas(64) float tile[V::kMaxTokens * kTile] = {};
    for (int64_t row = begin; row < end; row += kPanel) {
      const int rows = static_cast<int>(min64(kPanel, end - row));
      const CodeRows w = code_rows(m, expert, row, rows, end, then, blocks.count, thread, 0);
      const Wide* wide = widened(w, blocks.count, rows, a.intermediate_size, thread, 0);
      for (int64_t block = 0; block < blocks.count; ++block) {
        const int64_t first = blocks.first(block);
        const int tokens = blocks.size(block);
        dot(w, wide, tokens, rows, a.intermediate_size, activations_of(expert, first), tile);
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
