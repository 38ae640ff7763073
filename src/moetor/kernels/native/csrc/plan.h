// Where everything lives for one call: the slots in expert order, and the workspace cut into its parts.
//
// Everything in these headers is in an unnamed namespace: each is compiled once per instruction set, and a function
// merged by the linker across them could hold instructions that the processor lacks.
#pragma once

#include "api.h"

namespace {

constexpr int kGroup = 32;        // rows are padded to this many floats; outputs are handled in panels of as many
constexpr int kTogether = 96;     // tokens that pass over a task's weights together, at most
constexpr int kManyTogether = 192;  // the same where their inputs need not stay in a cache (`many.h`)
constexpr int kManySlots = 18;      // of an expert: more of them are many
constexpr int64_t kManySums = 32 * kManyTogether * 16;  // floats: the vectors of a panel's sums
constexpr int64_t kManyTiles = 36 * kManyTogether;      // floats: the sums
constexpr int kStripColumns = 4096;  // the wider, the longer the runs of memory that are read at a time
constexpr int kStripStride = kStripColumns + 16;
constexpr int64_t kWidenedBytes = 384 * 1024;  // a panel of codes, widened: two fit into a second-level cache
constexpr int64_t kRoundedDepth = 65536;  // sums of so many products of bytes fit into 32 bits
constexpr int64_t kInputsTogether = 1 << 20;  // bytes of their inputs: half of a second-level cache

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// Bytes of a row of `size` inputs that are bytes: 64 for its scale and its sum, and whole vectors.
inline int64_t rounded_width(int64_t size) { return 64 + round_up(size, 64); }
inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Tokens whose inputs of `size` bytes a thread packs at a time, in blocks of `block`.
inline int64_t tokens_together(int64_t size, int64_t block) {
  const int64_t fit = kInputsTogether / (block * round_up(size, 4 * kGroup));
  return block * max64(1, min64(kTogether / block, fit));
}

// Whether a call runs on products of bfloat16 pairs, or of bytes. Inputs in other dtypes are not rounded to bfloat16.
inline bool paired(const MoetorExperts& a) {
  if (a.isa != kIsaAvx512Bf16 || a.dtype != kBfloat16) return false;
  const bool whole = a.weights == kInt8Row && max64(a.hidden_size, a.intermediate_size) <= kRoundedDepth;
  return a.round_inputs == 0 || whole;
}

struct Plan {
  int32_t* order;    // [R] slots t * K + k, by expert, ascending within one; dropped slots last
  int32_t* token;    // [R] the token of each
  int64_t* offsets;  // [E + 2] where an expert's slots start in `order`
  int32_t* active;   // [E] the experts with slots, ascending
  int64_t num_active, num_slots;  // num_slots: those that are not dropped
  float* h;          // [R, ldh] the activations, in expert order and in blocks (see pack_row)
  int8_t* rounded;   // the activations as bytes, where products are of bytes
  float* out;        // [T, ldo] the weighted sum
  float* packed;     // [threads, packed_floats] a thread's packed inputs
  float* strips;     // [threads, strip_floats] a thread's column sums (columns form); of codes, the scales and zero
                     // points of two panels, then the two panels widened to floats; of many tokens, sums
  int64_t ldx, ldh, ldo, packed_floats, strip_floats, scale_floats, widened_floats;
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
  const bool bytes = paired(a) && a.round_inputs;
  const int64_t pad = a.weights == kPlain ? kGroup : 4 * kGroup;
  p.ldx = round_up(a.hidden_size, pad);
  p.ldh = round_up(a.intermediate_size, pad);
  p.ldo = round_up(a.hidden_size, kGroup) + 16;  // an odd number of cache lines: 8 KB apart, rows would share a set
  p.order = reinterpret_cast<int32_t*>(take(4 * slots));
  p.token = reinterpret_cast<int32_t*>(take(4 * slots));
  p.offsets = reinterpret_cast<int64_t*>(take(8 * (a.num_experts + 2)));
  p.active = reinterpret_cast<int32_t*>(take(4 * a.num_experts));
  const bool many = paired(a) && a.weights == kPlain;
  const int64_t input_bytes = many ? 2 : 4;
  p.h = reinterpret_cast<float*>(take(input_bytes * slots * p.ldh));
  p.rounded = reinterpret_cast<int8_t*>(take(bytes ? slots * rounded_width(a.intermediate_size) : 0));
  p.out = reinterpret_cast<float*>(take(4 * a.tokens * p.ldo));
  const int64_t together = min64(slots, many ? kManyTogether : kTogether);
  p.packed_floats = (together + bytes) * p.ldx * input_bytes / 4;  // one more row, from which bytes are made
  p.packed = reinterpret_cast<float*>(take(4 * a.threads * p.packed_floats));
  if (a.gate_up_columns || a.down_columns) p.strip_floats = min64(slots, kTogether) * kStripStride;
  if (many && slots > kManySlots) p.strip_floats = max64(p.strip_floats, kManySums + 2 * kManyTiles);
  if (a.weights != kPlain) {
    const int64_t depth = max64(p.ldx, p.ldh), bytes_each = paired(a) ? 2 : 4;
    p.scale_floats = kGroup * round_up(a.group == 0 ? 1 : depth / kGroup + 1, 16);
    const bool widen = slots > a.num_experts && kGroup * depth * bytes_each <= kWidenedBytes;
    p.widened_floats = widen && !bytes ? kGroup * depth * bytes_each / 4 : 0;
    p.strip_floats = 4 * p.scale_floats + 2 * p.widened_floats;
  }
  p.strips = reinterpret_cast<float*>(take(4 * a.threads * p.strip_floats));
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
  for (int64_t t = 0, s = 0; t < a.tokens; ++t)
    for (int64_t k = 0; k < a.top_k; ++k, ++s) {
      const int64_t position = p.offsets[a.topk_ids[s]]++;
      p.order[position] = static_cast<int32_t>(s);
      p.token[position] = static_cast<int32_t>(t);
    }
  for (int64_t e = num_experts + 1; e > 0; --e) p.offsets[e] = p.offsets[e - 1];
  p.offsets[0] = 0;
  return true;
}

}  // namespace
