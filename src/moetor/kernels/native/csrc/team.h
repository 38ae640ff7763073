// Work cut into tasks that the threads of a team take from one counter.
#pragma once

#include "dense.h"
#include "plan.h"

namespace {

constexpr int64_t kTeamBytes = 128 * 1024;  // less memory than this is read sooner than a second thread wakes

template <class Body>
struct Tasks {
  const Body& body;
  int64_t count, next;
};

template <class Body>
inline void run_tasks(void* data) {
  auto& tasks = *static_cast<Tasks<Body>*>(data);
  for (;;) {
    const int64_t task = __atomic_fetch_add(&tasks.next, 1, __ATOMIC_RELAXED);
    if (task >= tasks.count) return;
    tasks.body(task);
  }
}

// body(0) ... body(count - 1), which together touch `bytes` of memory.
template <class Body>
inline void in_team(int64_t count, int64_t bytes, int threads, StartTeam start, const Body& body) {
  if (threads <= 1 || count <= 1 || bytes < kTeamBytes) {
    for (int64_t task = 0; task < count; ++task) body(task);
    return;
  }
  Tasks<Body> tasks{body, count, 0};
  start(run_tasks<Body>, &tasks, static_cast<int>(min64(threads, count)));
}

template <class D>
struct Type {
  using Element = D;
};

// Calls `f` with the `Type` of the elements that `dtype` names.
template <class F>
inline int with_dtype(int dtype, const F& f) {
  switch (dtype) {
    case kFloat32: return f(Type<float>{});
    case kBfloat16: return f(Type<Bf16>{});
    case kFloat16: return f(Type<Fp16>{});
    default: return kBadDtype;
  }
}

}  // namespace
