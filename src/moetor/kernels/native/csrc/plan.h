// Where everything lives for one call: the slots in expert order, and the workspace cut into its parts.
//
// Everything in these headers is in an unnamed namespace: each is compiled once per instruction set, and a function
// merged by the linker across them could hold instructions that the processor lacks.
#pragma once

#include "api.h"

namespace {

constexpr int kGroup = 32;        // rows are padded to this many floats; outputs are handled in panels of as many
constexpr int kStripTokens = 96;  // tokens whose column sums one thread holds at a time
constexpr int kStripColumns = 1024;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Row strides are an odd number of cache lines: rows 4 or 8 KB apart would all fall into one cache set.
inline int64_t row_stride(int64_t n) { return round_up(n, kGroup) + 16; }

struct Plan {
  int32_t* order;    // [R] slots t * K + k, by expert, ascending within one; dropped slots last
  int64_t* offsets;  // [E + 2] where an expert's slots start in `order`
  int32_t* active;   // [E] the experts with slots, ascending
  int64_t num_active, num_slots;  // num_slots: those that are not dropped
  float* x;          // [T or R, ldx] the input in float32 (one row a slot when the weight is on the input)
  float* h;          // [R, ldh] the activations in expert order
  float* out;        // [T, ldo] the weighted sum
  float* strips;     // [threads, strip_floats] column sums of a thread (columns form alone)
  int64_t ldx, ldh, ldo, strip_floats;
  int64_t bytes;
};

inline Plan make_plan(const MoetorExperts& a) {
  Plan p{};
  const int64_t slots = a.tokens * a.top_k;
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    char* start = static_cast<char*>(a.workspace) + at;
    at += round_up(bytes, 64);
    return start;
  };
  p.ldx = row_stride(a.hidden_size);
  p.ldh = row_stride(a.intermediate_size);
  p.ldo = row_stride(a.hidden_size);
  p.order = reinterpret_cast<int32_t*>(take(4 * slots));
  p.offsets = reinterpret_cast<int64_t*>(take(8 * (a.num_experts + 2)));
  p.active = reinterpret_cast<int32_t*>(take(4 * a.num_experts));
  p.x = reinterpret_cast<float*>(take(4 * (a.weight_on_input ? slots : a.tokens) * p.ldx));
  p.h = reinterpret_cast<float*>(take(4 * slots * p.ldh));
  p.out = reinterpret_cast<float*>(take(4 * a.tokens * p.ldo));
  if (a.gate_up_columns || a.down_columns) {
    p.strip_floats = min64(a.tokens, kStripTokens) * (kStripColumns + 16);
    p.strips = reinterpret_cast<float*>(take(4 * a.threads * p.strip_floats));
  }
  p.bytes = at;
  return p;
}

// Counting sort of the slots by expert. False when an id lies outside [0, E].
inline bool sort_slots(const MoetorExperts& a, Plan& p) {
  const int64_t slots = a.tokens * a.top_k, num_experts = a.num_experts;
  for (int64_t e = 0; e < num_experts + 2; ++e) p.offsets[e] = 0;
  for (int64_t s = 0; s < slots; ++s) {
    const int32_t e = a.topk_ids[s];
    if (e < 0 || e > num_experts) return false;
    ++p.offsets[e + 1];
  }
  p.num_active = 0;
  for (int64_t e = 0; e < num_experts; ++e)
    if (p.offsets[e + 1] > 0) p.active[p.num_active++] = static_cast<int32_t>(e);
  for (int64_t e = 0; e <= num_experts; ++e) p.offsets[e + 1] += p.offsets[e];
  p.num_slots = p.offsets[num_experts];
  for (int64_t s = 0; s < slots; ++s) p.order[p.offsets[a.topk_ids[s]]++] = static_cast<int32_t>(s);
  for (int64_t e = num_experts + 1; e > 0; --e) p.offsets[e] = p.offsets[e - 1];
  p.offsets[0] = 0;
  return true;
}

}  // namespace
