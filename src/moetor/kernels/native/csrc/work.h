// How a call is cut into tasks, and a thread's way through them.
//
// Tasks are taken in shares (`shares.h`), and a thread takes its next task before it starts the current one, so that the
// weights of the next are fetched while the current is computed, across the barrier between the phases too. Which thread
// runs a task never shows in the result: each output is computed wholly within one task.
#pragma once

#include "dot.h"
#include "shares.h"

namespace {

constexpr int64_t kTaskBytes = 512 * 1024;  // weights of one first-phase task: they stay in the second-level cache
constexpr int64_t kRunBytes = 1024 * 1024;  // weights of an expert's second product that a thread reads on end, at most
constexpr int64_t kRunRows = 1024;  // rows of a first product whose sums wait for those of the other half
constexpr int64_t kSpan = 4096;  // the second product sums its reduction axis in spans of this: rounding, and caches

// L: how inputs are laid out.
template <class V, class D, class L>
class Work {
 public:
  using Input = typename L::Input;
  Work(const MoetorExperts& args, const Plan& plan)
      : a(args), p(plan), ldx_(L::width(args.hidden_size)), ldh_(L::width(args.intermediate_size)) {
    h_in_rows_ = a.down_columns;
    parts_ = a.gated ? 2 : 1;
    up_together_ = together(a.gate_up_columns, a.hidden_size);
    down_together_ = together(a.down_columns, min64(a.intermediate_size, kSpan));
    cut_up(max64(1, a.threads));
    cut_down(max64(1, a.threads));
    shares_.cut(up_tasks_, down_tasks_, max64(1, a.threads));
  }

 protected:
  static constexpr int64_t kInputSize = sizeof(Input);
  struct Weights {  // where a panel or a strip starts, and the stride between its rows
    const D* at;
    int64_t stride;
  };
  struct UpTask {  // rows [begin, end) of the activation for one expert's slots [first, first + tokens), which are
    int64_t expert, begin, end, first, tokens;  // its blocks [top, bottom) unless the weights are in columns form
    int64_t top, bottom;
  };
  struct Cursor {  // a thread's place in the list of tasks
    int thread;
    int64_t active = 0, before = 0;  // index in p.active; tasks of the experts before it
    UpTask task{};                   // the next first-phase task
    Weights next{};                  // the first weights of the next task of either phase
    int64_t packed_expert = -1, packed_first = -1;
  };
  struct Blocks {  // slots cut into blocks of nearly equal size
    int64_t slots, count;
    explicit Blocks(int64_t slots_) : slots(slots_), count(ceil_div(slots_, V::kMaxTokens)) {}
    int64_t first(int64_t block) const { return slots * block / count; }
    int size(int64_t block) const { return static_cast<int>(first(block + 1) - first(block)); }
  };

  // Tokens that pass over weights together.
  int64_t together(bool columns, int64_t size) const {
    if (columns) return kTogether;
    return kPaired<V> && a.weights == kPlain ? kManyTogether : tokens_together(size * kInputSize, V::kMaxTokens);
  }

  // Cuts the first products of each expert into equal chunks.
  void cut_up(int64_t threads) {
    const int64_t I = a.intermediate_size, active = max64(1, p.num_active);
    bool runs = !a.gate_up_columns && !a.interleaved;
    for (int64_t n = 0; n < p.num_active; ++n) runs = runs && slots_of(p.active[n]) <= V::kMaxTokens;
    const int64_t panel_bytes = parts_ * kPanel * a.hidden_size * static_cast<int64_t>(sizeof(D));
    const int64_t most = a.gate_up_columns ? kStripColumns / parts_
                         : runs            ? kRunRows
                                           : kPanel * max64(1, kTaskBytes / panel_bytes);
    const int64_t evenly = ceil_div(I, ceil_div(4 * threads, active));  // few experts: enough tasks for all threads
    up_width_ = round_up(min64(most, evenly), kPanel);
    chunks_ = ceil_div(I, up_width_);
    if (runs) {  // few tasks: as many for each thread
      while (active * chunks_ % threads != 0) ++chunks_;
      up_width_ = round_up(ceil_div(I, chunks_), kPanel);
      chunks_ = ceil_div(I, up_width_);
    }
    up_tasks_ = 0;
    for (int64_t n = 0; n < p.num_active; ++n) up_tasks_ += groups_of(n) * chunks_;
  }

  // Cuts the output's columns into slices. Bound by reading, they are wide: a slice of an expert's weights is read on end.
  void cut_down(int64_t threads) {
    const int64_t H = a.hidden_size;
    const bool busy = p.num_slots >= 8 * max64(1, p.num_active);  // enough tokens an expert to be bound by arithmetic
    down_width_ = ceil_div(H, threads * (a.down_columns ? 2 : busy ? 4 : 16));
    if (!busy && !a.down_columns) {
      const int64_t row_bytes = a.down_stride * static_cast<int64_t>(a.weights == kPlain ? sizeof(D) : 1);
      down_width_ = max64(down_width_, min64(ceil_div(H, 2 * threads), kRunBytes / max64(1, row_bytes)));
    }
    down_width_ = round_up(down_width_, kPanel);
    if (a.down_columns) down_width_ = min64(down_width_, kStripColumns);
    down_tasks_ = ceil_div(H, down_width_);
  }

  int64_t take(const Cursor& at) { return shares_.take(at.thread); }
  int64_t slots_of(int64_t expert) const { return p.offsets[expert + 1] - p.offsets[expert]; }
  // Slots of one expert are cut into groups at the borders of blocks.
  int64_t groups_of(int64_t active) const {
    const int64_t slots = slots_of(p.active[active]);
    return a.gate_up_columns ? ceil_div(slots, up_together_)
                             : ceil_div(Blocks(slots).count, up_together_ / V::kMaxTokens);
  }
  // The activations of an expert's slots from `slot` on.
  Input* activations(int64_t expert, int64_t slot) const {
    return reinterpret_cast<Input*>(p.h) + (p.offsets[expert] + slot) * ldh_;
  }

  Weights up_weights(int64_t expert, int64_t i) const {  // gate row (or column) i
    const D* base = static_cast<const D*>(a.gate_up) + expert * a.gate_up_expert_stride;
    const int64_t along = a.interleaved ? 2 * i : i;
    if (a.gate_up_columns) return {base + along, a.gate_up_stride};
    return {base + along * a.gate_up_stride, a.interleaved ? 2 * a.gate_up_stride : a.gate_up_stride};
  }
  Weights down_weights(int64_t expert, int64_t row) const {
    const D* base = static_cast<const D*>(a.down) + expert * a.down_expert_stride;
    return {base + row * (a.down_columns ? 1 : a.down_stride), a.down_stride};
  }

  // Moves a thread's cursor to `task`.
  void seek(Cursor& at, int64_t task) const {
    at.next = {static_cast<const D*>(a.down), 0};
    if (task >= up_tasks_) {
      if (task < up_tasks_ + down_tasks_ && p.num_active > 0)
        at.next = down_weights(p.active[0], (task - up_tasks_) * down_width_);
      return;
    }
    if (task < at.before) at.active = at.before = 0;
    while (task >= at.before + groups_of(at.active) * chunks_) at.before += groups_of(at.active++) * chunks_;
    const int64_t expert = p.active[at.active], slots = slots_of(expert);
    const int64_t group = (task - at.before) / chunks_, begin = (task - at.before) % chunks_ * up_width_;
    int64_t first = group * up_together_, last = min64(first + up_together_, slots), top = 0, bottom = 0;
    if (!a.gate_up_columns) {
      const Blocks blocks(slots);
      const int64_t each = up_together_ / V::kMaxTokens;
      top = group * each;
      bottom = min64(top + each, blocks.count);
      first = blocks.first(top);
      last = blocks.first(bottom);
    }
    at.task = {expert, begin, min64(begin + up_width_, a.intermediate_size), first, last - first, top, bottom};
    at.next = up_weights(expert, begin);
  }

  const MoetorExperts& a;
  const Plan& p;
  const int64_t ldx_, ldh_;  // elements from one token's inputs to the next's
  bool h_in_rows_;  // the activations lie in rows, not in blocks
  int64_t parts_, up_together_, down_together_;
  int64_t up_width_, chunks_, up_tasks_;  // activations of one task; tasks per group of slots; tasks
  int64_t down_width_, down_tasks_;
  Shares shares_;
};

}  // namespace
