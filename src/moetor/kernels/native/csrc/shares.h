// Tasks of two phases, of which each thread has a share.
#pragma once

#include "plan.h"

namespace {

// The tasks of a share lie side by side, since memory is read fastest where a thread reads on and on from one place. A
// thread that is through with its own helps with the others'.
class Shares {
 public:
  // Into those of `threads`: tasks [0, first) and, after them, [first, first + second).
  void cut(int64_t first, int64_t second, int64_t threads) {
    end_ = first + second;
    count_ = static_cast<int>(min64(threads, kMost));
    for (int64_t i = 0; i < count_; ++i) {
      left_[0][i] = {first * i / count_, first * (i + 1) / count_};
      left_[1][i] = {first + second * i / count_, first + second * (i + 1) / count_};
    }
  }

  // A thread's next task, or the number of tasks. Those of the second phase come when none of the first is left to take.
  int64_t take(int thread) {
    for (auto& phase : left_)
      for (int i = 0; i < count_; ++i) {
        Share& share = phase[(thread + i) % count_];
        const int64_t task = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED);
        if (task < share.end) return task;
      }
    return end_;
  }

 private:
  static constexpr int kMost = 64;
  struct alignas(64) Share {
    int64_t next, end;
  };
  int64_t end_;
  int count_;
  Share left_[2][kMost];
};

}  // namespace
