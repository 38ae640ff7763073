// One call, as each thread runs it: first products and activations, then second products and the weighted sum.
#pragma once

#include "activation.h"
#include "columns.h"
#include "many.h"
#include "work.h"

extern "C" {
// Of the OpenMP runtime that torch has already loaded: one pool of threads for both.
void GOMP_barrier(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

namespace {

template <class V, class D, class L = Steps<V, kSplit<D> && !kPaired<V>>>
class Experts : public Work<V, D, L> {
  using Base = Work<V, D, L>;

 public:
  using typename Base::Input;
  using Base::Base;

  // Runs in every thread of a team.
  void run() {
    const int team = omp_get_num_threads();
    Cursor at;
    at.thread = omp_get_thread_num();
    int64_t task = take(at);
    seek(at, task);
    while (task < up_tasks_) {
      const UpTask now = at.task;
      task = take(at);
      seek(at, task);
      a.gate_up_columns ? up_columns(now, at) : up_rows(now, at);
    }
    if (team > 1) GOMP_barrier();
    while (task < up_tasks_ + down_tasks_) {
      const int64_t now = task - up_tasks_;
      task = take(at);
      seek(at, task);
      down(now, [&](int64_t n, int64_t begin, int64_t end) {
        const Weights after = n + 1 < p.num_active ? down_weights(p.active[n + 1], begin) : at.next;
        a.down_columns ? down_columns(p.active[n], begin, end, after.at, at.thread)
                       : down_rows(p.active[n], begin, end, after, at.thread);
      });
    }
  }

 protected:
  using typename Base::Blocks;
  using typename Base::Cursor;
  using typename Base::UpTask;
  using typename Base::Weights;
  using Base::a;
  using Base::activations;
  using Base::down_tasks_;
  using Base::down_together_;
  using Base::down_weights;
  using Base::down_width_;
  using Base::h_in_rows_;
  using Base::ldh_;
  using Base::ldx_;
  using Base::p;
  using Base::parts_;
  using Base::seek;
  using Base::slots_of;
  using Base::take;
  using Base::up_tasks_;
  using Base::up_weights;

  // Copies the input of an expert's slot into a block of packed inputs.
  void pack_input(const UpTask& task, int64_t slot, Input* block, int tokens, int token) const {
    const int64_t position = p.offsets[task.expert] + slot;
    const D* from = static_cast<const D*>(a.hidden) + p.token[position] * a.hidden_size;
    const float factor = a.weight_on_input ? a.topk_weights[p.order[position]] : 1.0f;
    a.gate_up_columns ? L::Columns::put(block, tokens, token, 0, from, a.hidden_size, factor)
                      : L::put(block, tokens, token, 0, from, a.hidden_size, factor);
    if constexpr (kSame<Input, float>)
      if (a.round_inputs) round_row<V>(block, tokens, token, a.hidden_size);
  }

  // Copies the inputs of a task into the thread's own memory, unless its last task had the same ones: a row of `width`
  // elements each, by put(slot, block, tokens, token).
  template <class X, class Put>
  X* pack(const UpTask& task, const Blocks& blocks, Cursor& at, int64_t width, const Put& put) const {
    auto* packed = reinterpret_cast<X*>(p.packed + at.thread * p.packed_floats);
    if (at.packed_expert == task.expert && at.packed_first == task.first) return packed;
    // One token, once to an expert: they all read the same.
    if (at.packed_expert >= 0 && a.tokens == 1 && p.num_active == p.num_slots && !a.weight_on_input) return packed;
    at.packed_expert = task.expert;
    at.packed_first = task.first;
    for (int64_t slot = 0; a.gate_up_columns && slot < task.tokens; ++slot)
      put(task.first + slot, packed + slot * width, 1, 0);
    for (int64_t block = task.top; block < task.bottom; ++block) {
      const int64_t first = blocks.first(block);
      const int tokens = blocks.size(block);
      for (int n = 0; n < tokens; ++n) put(first + n, packed + (first - task.first) * width, tokens, n);
    }
    return packed;
  }
  Input* pack(const UpTask& task, const Blocks& blocks, Cursor& at) const {
    return pack<Input>(task, blocks, at, ldx_, [&](int64_t slot, Input* block, int tokens, int token) {
      pack_input(task, slot, block, tokens, token);
    });
  }

  // Activations [i, i + count) from the two sums, which are destroyed, into place `token` of a block of `tokens`. i is a
  // multiple of 32.
  void finish_up(float* gate, float* up, int64_t expert, int64_t i, int count, Input* block, int tokens,
                 int token) const {
    if (a.gate_up_bias != nullptr) {
      const auto* bias = static_cast<const D*>(a.gate_up_bias) + expert * a.gate_up_bias_stride;
      if (a.interleaved) {
        float both[2 * kPanel];
        pack_row<V>(both, 1, 0, 0, bias + 2 * i, 2 * count, 1.0f, false);
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
    a.down_columns ? L::Columns::put(block, tokens, token, i, gate, count, 1.0f)
                   : L::put(block, tokens, token, i, gate, count, 1.0f);
  }

  // The same for a panel of a block of `tokens` slots from `first` on.
  void finish_panel(float* gate, float* up, int64_t expert, int64_t first, int tokens, int64_t i, int rows) const {
    Input* h = activations(expert, first);
    for (int n = 0; n < tokens; ++n)
      finish_up(gate + n * kTile, up + n * kTile, expert, i, rows, h_in_rows_ ? h + n * ldh_ : h,
                h_in_rows_ ? 1 : tokens, h_in_rows_ ? 0 : n);
  }

  // Whether a task reads its rows of the gate on end, and then those of up: where one block of tokens passes over them.
  bool in_runs(const UpTask& task) const {
    return task.bottom - task.top == 1 && task.end - task.begin <= kRunRows && !a.interleaved;
  }
  // Such a task, by product(part, i, rows, sums of a panel).
  template <class Product>
  void finish_runs(const UpTask& task, const Product& product) const {
    alignas(64) float gate[ceil_div(kRunRows, kPanel)][V::kMaxTokens * kTile], up[V::kMaxTokens * kTile] = {};
    for (int part = 0; part < parts_; ++part)
      for (int64_t i = task.begin; i < task.end; i += kPanel) {
        const int rows = static_cast<int>(min64(kPanel, task.end - i));
        float* const first = gate[(i - task.begin) / kPanel];
        if (part == 0 && rows < kPanel) memset(first, 0, sizeof(gate[0]));
        product(part, i, rows, part == 0 ? first : up);
        if (part + 1 == parts_)
          finish_panel(first, up, task.expert, task.first, static_cast<int>(task.tokens), i, rows);
      }
  }

  static bool many(int64_t blocks, int rows) {
    return kPaired<V> && blocks * V::kMaxTokens > kManySlots && rows >= 4;
  }

  // A panel of the first product for many blocks of tokens. What follows is fetched, and no more: a second-level cache
  // holds little else.
  void up_many(const UpTask& task, const Blocks& blocks, int64_t i, int rows, const Input* packed, const Weights& next,
               int64_t to_up, int thread) const {
    float* const sums = p.strips + thread * p.strip_floats;
    float* const tiles = sums + kManySums;
    const Weights here = up_weights(task.expert, i);
    const auto x = [&](int64_t block) { return packed + (blocks.first(block) - task.first) * ldx_; };
    for (int part = 0; part < parts_; ++part) {
      const Weights then = part + 1 < parts_ ? Weights{here.at + to_up, here.stride} : next;
      many_panel<V, D>(here.at + part * to_up, here.stride, rows, a.hidden_size, blocks, task.top, task.bottom, x, sums,
                       tiles + part * kManyTiles, then.at, then.stride);
    }
    for (int64_t block = task.top; block < task.bottom; ++block) {
      float* const tile = tiles + (block - task.top) * V::kMaxTokens * kTile;
      finish_panel(tile, tile + kManyTiles, task.expert, blocks.first(block), blocks.size(block), i, rows);
    }
  }

  void up_rows(const UpTask& task, Cursor& at) const {
    const Blocks blocks(slots_of(task.expert));
    const int64_t to_up = (a.interleaved ? 1 : a.intermediate_size) * a.gate_up_stride;
    alignas(64) float tile[2][V::kMaxTokens * kTile] = {};
    const Input* packed = pack(task, blocks, at);
    if (in_runs(task)) {
      return finish_runs(task, [&](int part, int64_t i, int rows, float* sums) {
        const bool more = i + kPanel < task.end;
        const Weights here = up_weights(task.expert, i), begin = up_weights(task.expert, task.begin);
        Weights next = more ? up_weights(task.expert, i + kPanel) : part + 1 < parts_ ? begin : at.next;
        if (more || part + 1 < parts_) next.at += (more ? part : 1) * to_up;
        dot_panel_of<V, D>(blocks.size(task.top), here.at + part * to_up, here.stride, rows, a.hidden_size, packed, sums,
                           {next.at, next.stride, 1, 0});
      });
    }
    for (int64_t i = task.begin; i < task.end; i += kPanel) {
      const int rows = static_cast<int>(min64(kPanel, task.end - i));
      const bool more = i + kPanel < task.end;
      if (many(task.bottom - task.top, rows)) {
        up_many(task, blocks, i, rows, packed, more ? up_weights(task.expert, i + kPanel) : at.next, to_up, at.thread);
        continue;
      }
      const Weights here = up_weights(task.expert, i), next = more ? up_weights(task.expert, i + kPanel) : at.next;
      for (int64_t block = task.top; block < task.bottom; ++block) {
        const int64_t first = blocks.first(block), period = task.bottom - task.top;
        const int tokens = blocks.size(block);
        for (int part = 0; part < parts_; ++part) {
          Ahead<D> ahead{next.at, next.stride, period, block - task.top};
          if (period > 1 && more)
            ahead.next += part * to_up;
          else if (period == 1 && part + 1 < parts_)
            ahead = {here.at + to_up, here.stride, 1, 0};
          dot_panel_of<V, D>(tokens, here.at + part * to_up, here.stride, rows, a.hidden_size,
                             packed + (first - task.first) * ldx_, tile[part], ahead);
        }
        finish_panel(tile[0], tile[1], task.expert, first, tokens, i, rows);
      }
    }
  }

  void up_columns(const UpTask& task, Cursor& at) const {
    const int64_t H = a.hidden_size, width = task.end - task.begin;
    const bool two_strips = a.gated && !a.interleaved;
    const Blocks blocks(slots_of(task.expert));
    float* sums = p.strips + at.thread * p.strip_floats;
    const Input* packed = pack(task, blocks, at);
    const Weights w = up_weights(task.expert, task.begin);
    const int tokens = static_cast<int>(task.tokens);
    column_strip<V, D>(w.at, w.stride, H, a.interleaved ? 2 * width : width, packed, ldx_, tokens, sums,
                       two_strips ? w.at + a.intermediate_size : at.next.at);
    if (two_strips)
      column_strip<V, D>(w.at + a.intermediate_size, w.stride, H, width, packed, ldx_, tokens,
                         sums + kStripColumns / 2, at.next.at);
    int64_t block = 0;
    for (int s = 0; s < tokens; ++s) {
      const int64_t slot = task.first + s;
      while (blocks.first(block + 1) <= slot) ++block;
      const int64_t first = a.down_columns ? slot : blocks.first(block);
      Input* h = activations(task.expert, first);
      for (int64_t c = 0; c < width; c += kPanel) {
        alignas(64) float gate[kPanel], up[kPanel];
        const float* row = sums + s * kStripStride;
        for (int j = 0; j < kPanel; ++j) {
          gate[j] = a.interleaved ? row[2 * (c + j)] : row[c + j];
          up[j] = a.interleaved ? row[2 * (c + j) + 1] : a.gated ? row[kStripColumns / 2 + c + j] : 0.0f;
        }
        finish_up(gate, up, task.expert, task.begin + c, static_cast<int>(min64(kPanel, width - c)), h,
                  a.down_columns ? 1 : blocks.size(block), static_cast<int>(slot - first));
      }
    }
  }

  // Adds rows [begin, begin + count) of the second product of an expert's slot to the sum of the slot's token.
  void finish_down(float* y, int64_t expert, int64_t slot_of_expert, int64_t begin, int64_t count, bool bias) const {
    const int64_t position = p.offsets[expert] + slot_of_expert;
    if (bias && a.down_bias != nullptr)
      add_bias<V>(y, static_cast<const D*>(a.down_bias) + expert * a.down_bias_stride + begin, count);
    const float weight = a.weight_on_input ? 1.0f : a.topk_weights[p.order[position]];
    add_weighted<V>(p.out + p.token[position] * p.ldo + begin, y, count, weight);
  }

  // A slice of the output's columns for all tokens: experts in ascending order, then one rounding.
  template <class Add>
  void down(int64_t task, const Add& add) const {
    const int64_t begin = task * down_width_, end = min64(begin + down_width_, a.hidden_size);
    for (int64_t t = 0; t < a.tokens; ++t)
      memset(p.out + t * p.ldo + begin, 0, sizeof(float) * round_up(end - begin, kPanel));
    for (int64_t n = 0; n < p.num_active; ++n) add(n, begin, end);
    auto* out = static_cast<D*>(a.out);
    for (int64_t t = 0; t < a.tokens; ++t)
      narrow_row<V>(out + t * a.hidden_size + begin, p.out + t * p.ldo + begin, end - begin);
  }

  void down_rows(int64_t expert, int64_t begin, int64_t end, const Weights& after, int thread) const {
    const int64_t I = a.intermediate_size, each = down_together_ / V::kMaxTokens;
    const Blocks blocks(slots_of(expert));
    alignas(64) float tile[V::kMaxTokens * kTile] = {};
    for (int64_t span = 0; span < I; span += kSpan) {
      const int64_t size = min64(kSpan, I - span);
      for (int64_t top = 0; top < blocks.count; top += each) {
        const int64_t bottom = min64(top + each, blocks.count);
        Weights next{};
        for (int64_t row = begin; row < end; row += kPanel) {
          const Weights here = down_weights(expert, row);
          if (row + kPanel < end) {
            next = down_weights(expert, row + kPanel);
            next.at += span;
          } else if (bottom < blocks.count || span + kSpan < I) {
            next = down_weights(expert, begin);
            next.at += bottom < blocks.count ? span : span + kSpan;
          } else {
            next = after;
          }
          const int rows = static_cast<int>(min64(kPanel, end - row));
          if (many(bottom - top, rows)) {
            float* const sums = p.strips + thread * p.strip_floats;
            float* const tiles = sums + kManySums;
            const auto x = [&](int64_t block) {
              return activations(expert, blocks.first(block)) + span * blocks.size(block);
            };
            many_panel<V, D>(here.at + span, here.stride, rows, size, blocks, top, bottom, x, sums, tiles, next.at,
                             next.stride);
            for (int64_t block = top; block < bottom; ++block)
              for (int n = 0; n < blocks.size(block); ++n)
                finish_down(tiles + ((block - top) * V::kMaxTokens + n) * kTile, expert, blocks.first(block) + n, row,
                            rows, span == 0);
            continue;
          }
          for (int64_t block = top; block < bottom; ++block) {
            const int64_t first = blocks.first(block);
            const int tokens = blocks.size(block);
            const Input* x = activations(expert, first) + span * tokens;
            const Ahead<D> ahead{next.at, next.stride, bottom - top, block - top};
            dot_panel_of<V, D>(tokens, here.at + span, here.stride, rows, size, x, tile, ahead);
            for (int n = 0; n < tokens; ++n)
              finish_down(tile + n * kTile, expert, first + n, row, rows, span == 0);
          }
        }
      }
    }
  }

  void down_columns(int64_t expert, int64_t begin, int64_t end, const D* after, int thread) const {
    const int64_t slots = slots_of(expert);
    const Weights w = down_weights(expert, begin);
    float* sums = p.strips + thread * p.strip_floats;
    for (int64_t first = 0; first < slots; first += down_together_) {
      const int tokens = static_cast<int>(min64(down_together_, slots - first));
      column_strip<V, D>(w.at, w.stride, a.intermediate_size, end - begin,
                         activations(expert, first), ldh_, tokens, sums,
                         first + down_together_ < slots ? w.at : after);
      for (int s = 0; s < tokens; ++s)
        finish_down(sums + s * kStripStride, expert, first + s, begin, end - begin, true);
    }
  }
};

}  // namespace
