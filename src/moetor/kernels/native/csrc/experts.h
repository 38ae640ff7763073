// One call, as each thread runs it: widen the inputs, first products and activations, second products and weighted sum.
//
// Tasks come from one counter in a fixed order, and a thread takes its next task before it starts the current one, so
// that the weights of the next are fetched while the current is computed, across the barrier between the phases too.
// Which thread runs a task never shows in the result: each output is computed wholly within one task.
#pragma once

#include "activation.h"
#include "columns.h"

extern "C" {
// Of the OpenMP runtime that torch has already loaded: one pool of threads for both.
void GOMP_barrier(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

namespace {

constexpr int64_t kTaskBytes = 512 * 1024;  // weights of one first-phase task: they stay in the second-level cache
constexpr int kTogether = 96;               // tokens that pass over those weights together

template <class V, class D>
class Experts {
 public:
  Experts(const MoetorExperts& args, const Plan& plan) : a(args), p(plan) {
    const int64_t I = a.intermediate_size, H = a.hidden_size;
    const int64_t threads = a.threads > 1 ? a.threads : 1;
    const bool busy = p.num_slots >= 8 * max64(1, p.num_active);  // enough tokens an expert to be bound by arithmetic
    parts_ = a.gated ? 2 : 1;
    if (a.gate_up_columns) {
      up_width_ = kStripColumns / parts_ / (busy ? 2 : 1);
    } else {
      const int64_t panel_bytes = parts_ * kPanel * H * static_cast<int64_t>(sizeof(D));
      up_width_ = kPanel * max64(1, kTaskBytes / panel_bytes);
    }
    up_width_ = min64(up_width_, round_up(ceil_div(I, max64(1, 4 * threads / max64(1, p.num_active))), kPanel));
    up_tasks_each_ = ceil_div(I, up_width_);
    up_tasks_ = p.num_active * up_tasks_each_;
    const int64_t slices = threads * (busy ? 4 : a.down_columns ? 2 : 16);
    down_width_ = round_up(ceil_div(H, slices), kPanel);
    if (a.down_columns) down_width_ = min64(down_width_, kStripColumns);
    down_tasks_ = ceil_div(H, down_width_);
  }

  // Runs in every thread of a team.
  void run() {
    const int team = omp_get_num_threads();
    widen(omp_get_thread_num(), team);
    int64_t task = take();
    wait(team);
    for (int64_t next; task < up_tasks_; task = next) {
      next = take();
      a.gate_up_columns ? up_columns(task, next) : up_rows(task, next);
    }
    wait(team);
    for (int64_t next; task < up_tasks_ + down_tasks_; task = next) {
      next = take();
      down(task - up_tasks_, next);
    }
  }

 private:
  struct Tokens {  // inputs of one block
    const float* x[kTogether];
  };

  int64_t take() { return __atomic_fetch_add(&next_task_, 1, __ATOMIC_RELAXED); }
  static void wait(int team) {
    if (team > 1) GOMP_barrier();
  }
  static constexpr bool split_for(bool columns) { return kSplit<D> && !columns; }
  const D* up_weights(int64_t expert, int64_t i) const {  // gate row (or column) i
    const int64_t along = a.gate_up_columns ? 1 : a.gate_up_stride;
    return static_cast<const D*>(a.gate_up) + expert * a.gate_up_expert_stride + (a.interleaved ? 2 * i : i) * along;
  }
  const D* down_weights(int64_t expert, int64_t row) const {
    return static_cast<const D*>(a.down) + expert * a.down_expert_stride + row * (a.down_columns ? 1 : a.down_stride);
  }
  // The first weights of a task: what to fetch at the end of the one before.
  const D* first_weights(int64_t task) const {
    if (task < up_tasks_) return up_weights(p.active[task / up_tasks_each_], task % up_tasks_each_ * up_width_);
    if (task < up_tasks_ + down_tasks_ && p.num_active > 0)
      return down_weights(p.active[0], (task - up_tasks_) * down_width_);
    return reinterpret_cast<const D*>(p.x);
  }
  int64_t first_stride(int64_t task) const {
    return task < up_tasks_ ? up_stride() : task < up_tasks_ + down_tasks_ ? a.down_stride : 0;
  }
  int64_t up_stride() const { return a.interleaved && !a.gate_up_columns ? 2 * a.gate_up_stride : a.gate_up_stride; }

  void widen(int thread, int team) {
    const int64_t H = a.hidden_size;
    const bool split = split_for(a.gate_up_columns);
    const auto* hidden = static_cast<const D*>(a.hidden);
    const int64_t rows = a.weight_on_input ? a.tokens * a.top_k : a.tokens;
    for (int64_t row = thread; row < rows; row += team) {
      const int64_t token = a.weight_on_input ? row / a.top_k : row;
      const float factor = a.weight_on_input ? a.topk_weights[row] : 1.0f;
      widen_row<V>(p.x + row * p.ldx, hidden + token * H, H, factor, split);
    }
  }

  const float* input_of(int64_t position) const {
    const int64_t slot = p.order[position];
    return p.x + (a.weight_on_input ? slot : slot / a.top_k) * p.ldx;
  }

  // h[position][i..i + count) from the two sums (destroyed). i is a multiple of 32.
  void finish_up(float* gate, float* up, int64_t expert, int64_t position, int64_t i, int count) {
    if (a.gate_up_bias != nullptr) {
      const auto* bias = static_cast<const D*>(a.gate_up_bias) + expert * a.gate_up_bias_stride;
      if (a.interleaved) {
        float both[2 * kPanel];
        widen_row<V>(both, bias + 2 * i, 2 * count, 1.0f, false);
        for (int j = 0; j < count; ++j) {
          gate[j] += both[2 * j];
          up[j] += both[2 * j + 1];
        }
      } else {
        add_bias<V>(gate, bias + i, count);
        if (a.gated) add_bias<V>(up, bias + a.intermediate_size + i, count);
      }
    }
    activate<V>(a, gate, up, count, gate);
    widen_row<V>(p.h + position * p.ldh + i, gate, count, 1.0f, split_for(a.down_columns));
  }

  void up_rows(int64_t task, int64_t next_task) {
    const int64_t expert = p.active[task / up_tasks_each_], H = a.hidden_size, I = a.intermediate_size;
    const int64_t i_begin = task % up_tasks_each_ * up_width_, i_end = min64(i_begin + up_width_, I);
    const int64_t start = p.offsets[expert], slots = p.offsets[expert + 1] - start;
    const int64_t up_offset = (a.interleaved ? 1 : I) * a.gate_up_stride, stride = up_stride();
    alignas(64) float tile[2][V::kMaxTokens * kPanel] = {};
    Tokens in;
    for (int64_t group = 0; group < slots; group += kTogether) {
      const int tokens = static_cast<int>(min64(kTogether, slots - group));
      const int blocks = static_cast<int>(ceil_div(tokens, V::kMaxTokens));
      for (int s = 0; s < tokens; ++s) in.x[s] = input_of(start + group + s);
      for (int64_t i = i_begin; i < i_end; i += kPanel) {
        const int rows = static_cast<int>(min64(kPanel, i_end - i));
        const bool more = i + kPanel < i_end, last_group = group + kTogether >= slots;
        const D* here = up_weights(expert, i);
        const D* next = more ? up_weights(expert, i + kPanel) : last_group ? first_weights(next_task)
                                                                           : up_weights(expert, i_begin);
        const int64_t next_stride = more || !last_group ? stride : first_stride(next_task);
        for (int block = 0; block < blocks; ++block) {
          const int first = tokens * block / blocks, count = tokens * (block + 1) / blocks - first;
          for (int part = 0; part < parts_; ++part) {
            const D* w = here + part * up_offset;
            const bool chain = blocks == 1, to_up = chain && part + 1 < parts_;
            const Ahead<D> ahead = to_up ? Ahead<D>{here + up_offset, stride, 1, 0, true}
                                   : chain ? Ahead<D>{next, next_stride, 1, 0, true}
                                           : Ahead<D>{next + (more ? part * up_offset : 0), next_stride, blocks, block,
                                                      false};
            dot_panel_of<V, D>(count, w, stride, rows, H, in.x + first, tile[part], ahead);
          }
          for (int n = 0; n < count; ++n)
            finish_up(tile[0] + n * kPanel, tile[1] + n * kPanel, expert, start + group + first + n, i, rows);
        }
      }
    }
  }

  void up_columns(int64_t task, int64_t next_task) {
    const int64_t expert = p.active[task / up_tasks_each_], H = a.hidden_size, I = a.intermediate_size;
    const int64_t i_begin = task % up_tasks_each_ * up_width_, i_end = min64(i_begin + up_width_, I);
    const int64_t start = p.offsets[expert], slots = p.offsets[expert + 1] - start;
    const int64_t sums_stride = kStripColumns + 16, width = i_end - i_begin;
    const bool two_strips = a.gated && !a.interleaved;
    float* sums = p.strips + omp_get_thread_num() * p.strip_floats;
    const D* w = up_weights(expert, i_begin);
    Tokens in;
    for (int64_t group = 0; group < slots; group += kTogether) {
      const int tokens = static_cast<int>(min64(kTogether, slots - group));
      for (int s = 0; s < tokens; ++s) in.x[s] = input_of(start + group + s);
      const D* next = group + kTogether < slots ? w : first_weights(next_task);
      column_strip<V, D>(w, a.gate_up_stride, H, a.interleaved ? 2 * width : width, in.x, tokens, sums, sums_stride,
                         two_strips ? w + I : next);
      if (two_strips)
        column_strip<V, D>(w + I, a.gate_up_stride, H, width, in.x, tokens, sums + kStripColumns / 2, sums_stride, next);
      for (int s = 0; s < tokens; ++s)
        for (int64_t c = 0; c < width; c += kPanel) {
          const int count = static_cast<int>(min64(kPanel, width - c));
          alignas(64) float gate[kPanel], up[kPanel];
          const float* row = sums + s * sums_stride;
          for (int j = 0; j < kPanel; ++j) {
            gate[j] = a.interleaved ? row[2 * (c + j)] : row[c + j];
            up[j] = a.interleaved ? row[2 * (c + j) + 1] : row[kStripColumns / 2 + c + j];
          }
          finish_up(gate, up, expert, start + group + s, i_begin + c, count);
        }
    }
  }

  // Adds one expert's rows [begin, begin + count) of the second product to the sum of a slot's token.
  void finish_down(float* y, int64_t expert, int64_t position, int64_t begin, int64_t count) {
    const int64_t slot = p.order[position];
    if (a.down_bias != nullptr)
      add_bias<V>(y, static_cast<const D*>(a.down_bias) + expert * a.down_bias_stride + begin, count);
    const float weight = a.weight_on_input ? 1.0f : a.topk_weights[slot];
    add_weighted<V>(p.out + slot / a.top_k * p.ldo + begin, y, count, weight);
  }

  // A slice of the output's columns for all tokens: experts in ascending order, then one rounding.
  void down(int64_t task, int64_t next_task) {
    const int64_t begin = task * down_width_, end = min64(begin + down_width_, a.hidden_size);
    for (int64_t t = 0; t < a.tokens; ++t)
      memset(p.out + t * p.ldo + begin, 0, sizeof(float) * round_up(end - begin, kPanel));
    for (int64_t n = 0; n < p.num_active; ++n)
      a.down_columns ? down_columns(n, begin, end, next_task) : down_rows(n, begin, end, next_task);
    auto* out = static_cast<D*>(a.out);
    for (int64_t t = 0; t < a.tokens; ++t)
      narrow_row<V>(out + t * a.hidden_size + begin, p.out + t * p.ldo + begin, end - begin);
  }

  void down_rows(int64_t active, int64_t begin, int64_t end, int64_t next_task) {
    const int64_t expert = p.active[active], I = a.intermediate_size, stride = a.down_stride;
    const int64_t start = p.offsets[expert], slots = p.offsets[expert + 1] - start;
    const bool more_experts = active + 1 < p.num_active;
    const D* after = more_experts ? down_weights(p.active[active + 1], begin) : first_weights(next_task);
    const int64_t after_stride = more_experts ? stride : first_stride(next_task);
    alignas(64) float tile[V::kMaxTokens * kPanel] = {};
    Tokens in;
    for (int64_t group = 0; group < slots; group += kTogether) {
      const int tokens = static_cast<int>(min64(kTogether, slots - group));
      const int blocks = static_cast<int>(ceil_div(tokens, V::kMaxTokens));
      for (int s = 0; s < tokens; ++s) in.x[s] = p.h + (start + group + s) * p.ldh;
      for (int64_t row = begin; row < end; row += kPanel) {
        const int rows = static_cast<int>(min64(kPanel, end - row));
        const bool more = row + kPanel < end;
        for (int block = 0; block < blocks; ++block) {
          const int first = tokens * block / blocks, count = tokens * (block + 1) / blocks - first;
          const D* next = more ? down_weights(expert, row + kPanel) : after;
          const Ahead<D> ahead{next, more ? stride : after_stride, blocks, block, blocks == 1};
          dot_panel_of<V, D>(count, down_weights(expert, row), stride, rows, I, in.x + first, tile, ahead);
          for (int n = 0; n < count; ++n)
            finish_down(tile + n * kPanel, expert, start + group + first + n, row, rows);
        }
      }
    }
  }

  void down_columns(int64_t active, int64_t begin, int64_t end, int64_t next_task) {
    const int64_t expert = p.active[active], start = p.offsets[expert], slots = p.offsets[expert + 1] - start;
    const int64_t sums_stride = kStripColumns + 16;
    const D* w = down_weights(expert, begin);
    const D* after = active + 1 < p.num_active ? down_weights(p.active[active + 1], begin) : first_weights(next_task);
    float* sums = p.strips + omp_get_thread_num() * p.strip_floats;
    Tokens in;
    for (int64_t group = 0; group < slots; group += kTogether) {
      const int tokens = static_cast<int>(min64(kTogether, slots - group));
      for (int s = 0; s < tokens; ++s) in.x[s] = p.h + (start + group + s) * p.ldh;
      column_strip<V, D>(w, a.down_stride, a.intermediate_size, end - begin, in.x, tokens, sums, sums_stride,
                         group + kTogether < slots ? w : after);
      for (int s = 0; s < tokens; ++s)
        finish_down(sums + s * sums_stride, expert, start + group + s, begin, end - begin);
    }
  }

  const MoetorExperts& a;
  const Plan& p;
  int64_t parts_, up_width_, up_tasks_each_, up_tasks_, down_width_, down_tasks_;
  int64_t next_task_ = 0;
};

template <class V, class D>
void run_experts(const MoetorExperts& args, const Plan& plan, void (*start)(void (*)(void*), void*, int)) {
  Experts<V, D> experts(args, plan);
  start([](void* self) { static_cast<Experts<V, D>*>(self)->run(); }, &experts, args.threads);
}

// The entry of one instruction set.
template <class V>
int run_dtype(const MoetorExperts& args, const Plan& plan, void (*start)(void (*)(void*), void*, int)) {
  switch (args.dtype) {
    case kFloat32: run_experts<V, float>(args, plan, start); return kOk;
    case kBfloat16: run_experts<V, Bf16>(args, plan, start); return kOk;
    case kFloat16: run_experts<V, Fp16>(args, plan, start); return kOk;
    default: return kBadDtype;
  }
}

}  // namespace
