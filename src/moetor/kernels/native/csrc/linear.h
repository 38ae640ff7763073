// Products of a few rows with a whole weight: bound by reading the weight, which is done once and in place.
#pragma once

#include "activation.h"
#include "dot.h"
#include "team.h"

namespace {

constexpr int64_t kProductTaskBytes = 256 * 1024;

template <class V, class D>
class Linear {
 public:
  using L = Steps<V, kSplit<D> && !kPaired<V>>;
  using Input = typename L::Input;

  explicit Linear(const MoetorLinear& args)
      : a(args), ldx_(L::width(args.depth)), blocks_(ceil_div(args.tokens, V::kMaxTokens)),
        parts_(args.activation < 0 ? 1 : 2), width_(args.outputs / parts_) {
    const int64_t panel_bytes = parts_ * kPanel * a.depth * static_cast<int64_t>(sizeof(D));
    const int64_t evenly = ceil_div(width_, 4 * max64(1, a.threads));
    step_ = round_up(min64(evenly, kPanel * max64(1, kProductTaskBytes / panel_bytes)), kPanel);
    form_.alpha = 1.0f;
    form_.gated = 1;
    form_.activation = a.activation;
  }

  int run(StartTeam start) {
    auto* packed = static_cast<Input*>(a.packed);
    for (int64_t block = 0; block < blocks_; ++block)
      for (int64_t t = first(block); t < first(block + 1); ++t)
        L::put(packed + first(block) * ldx_, static_cast<int>(first(block + 1) - first(block)),
               static_cast<int>(t - first(block)), 0, static_cast<const D*>(a.x) + t * a.x_stride, a.depth, 1.0f);
    const int64_t bytes = a.outputs * a.depth * static_cast<int64_t>(sizeof(D));
    in_team(ceil_div(width_, step_), bytes, a.threads, start, [this](int64_t task) { rows(task); });
    return kOk;
  }

 private:
  int64_t first(int64_t block) const { return a.tokens * block / blocks_; }

  void rows(int64_t task) const {
    const int64_t begin = task * step_, end = min64(begin + step_, width_);
    const auto* weight = static_cast<const D*>(a.weight);
    alignas(64) float tile[2][V::kMaxTokens * kTile] = {};
    for (int64_t i = begin; i < end; i += kPanel) {
      const int count = static_cast<int>(min64(kPanel, end - i));
      // Behind the last panel comes that of another task, likely this thread's next one.
      const D* next = weight + min64(i + kPanel, width_ - 1) * a.weight_stride;
      for (int64_t block = 0; block < blocks_; ++block) {
        const int tokens = static_cast<int>(first(block + 1) - first(block));
        for (int part = 0; part < parts_; ++part) {
          const bool gate = part + 1 < parts_ && blocks_ == 1;  // the up rows come right after
          const D* then = gate ? weight + (width_ + i) * a.weight_stride : next + part * width_ * a.weight_stride;
          const Ahead<D> ahead{blocks_ == 1 && !gate ? next : then, a.weight_stride, blocks_, block};
          dot_panel_of<V, D>(tokens, weight + (part * width_ + i) * a.weight_stride, a.weight_stride, count, a.depth,
                             static_cast<const Input*>(a.packed) + first(block) * ldx_, tile[part], ahead);
        }
        for (int n = 0; n < tokens; ++n) finish(tile[0] + n * kTile, tile[1] + n * kTile, first(block) + n, i, count);
      }
    }
  }

  void finish(float* sums, float* up, int64_t token, int64_t i, int count) const {
    const auto* bias = static_cast<const D*>(a.bias);
    if (bias != nullptr) {
      add_bias<V>(sums, bias + i, count);
      if (parts_ == 2) add_bias<V>(up, bias + width_ + i, count);
    }
    if (parts_ == 2) activate<V>(form_, sums, up, count, sums);
    narrow_row<V>(static_cast<D*>(a.out) + token * width_ + i, sums, count);
  }

  const MoetorLinear& a;
  const int64_t ldx_, blocks_, parts_, width_;
  int64_t step_;
  MoetorExperts form_{};
};

// Of weights in half precision; in float32 the caller's own products are as quick.
template <class V>
int run_linear(const MoetorLinear& args, StartTeam start) {
  if (args.dtype == kBfloat16) return Linear<V, Bf16>(args).run(start);
  return args.dtype == kFloat16 ? Linear<V, Fp16>(args).run(start) : static_cast<int>(kBadDtype);
}

}  // namespace
