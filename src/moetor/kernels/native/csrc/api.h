// The C interface between Python and the native experts kernel.
//
// Shape letters: T tokens, K top_k, E experts, H hidden, I intermediate, J rows of the first product (2 I when gated),
// S slots of one expert, R = T * K slots.
#pragma once

#include <stdint.h>

extern "C" {

// Instruction sets, in rising order of preference. The numbers are part of the interface.
enum Isa { kIsaNone = 0, kIsaAvx2 = 1, kIsaAvx512 = 2, kIsaAvx512Bf16 = 3 };
enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum ActivationName { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kRelu2 = 4 };
// How the weights are stored: in the inputs' dtype, or as codes with scales (the formats of formats.py; packed codes are
// two a byte, 32 values in 16 bytes).
enum Weights { kPlain = 0, kInt8 = 1, kInt4 = 2, kInt4Zero = 3, kE2m1 = 4, kInt8Row = 5 };
enum ScaleType { kScaleFloat32 = 0, kScaleBfloat16 = 1, kScaleFloat16 = 2, kScaleE8m0 = 3 };
enum LimitPlace { kNoLimit = 0, kLimitBefore = 1, kLimitAfter = 2 };
enum Status { kOk = 0, kBadExpertId = 1, kSmallWorkspace = 2, kBadIsa = 3, kBadDtype = 4 };

// Field order and types are mirrored by `library.py`. Strides count elements, or bytes of codes. A matrix in "columns" form has its
// output axis contiguous ([E, H, J] and [E, I, H]); otherwise its reduction axis is ([E, J, H] and [E, H, I]).
struct MoetorExperts {
  const void* hidden;         // [T, H], contiguous
  const float* topk_weights;  // [T, K], contiguous
  const int32_t* topk_ids;    // [T, K], contiguous; E is a dropped slot
  const void* gate_up;
  const void* down;
  const void* gate_up_bias;  // [E, J] or null
  const void* down_bias;     // [E, H] or null
  const void* gate_up_scales;  // of codes, [E, J, groups]; null for plain weights
  const void* down_scales;     // [E, H, groups]
  const void* gate_up_zeros;   // like the scales, kInt4Zero alone
  const void* down_zeros;
  void* out;                 // [T, H], contiguous
  void* workspace;           // 64-byte aligned
  int64_t workspace_bytes;
  int64_t tokens, top_k, num_experts, hidden_size, intermediate_size;
  int64_t gate_up_expert_stride, gate_up_stride, down_expert_stride, down_stride;
  int64_t gate_up_bias_stride, down_bias_stride;
  int32_t dtype, isa, threads;
  int32_t gated, interleaved, gate_up_columns, down_columns, weight_on_input;
  int32_t activation, limit_place;
  int32_t weights, gate_up_scale_type, down_scale_type, group;  // group: values of a row that share a scale; 0: all of them
  int32_t round_inputs;                // both products' inputs become int8 with one scale a token
  float alpha, limit, up_shift, softcap, up_softcap;  // softcap 0: none of the two
};

// 1 when this processor and this system can run `isa`.
int moetor_supports(int isa);
// Bytes that `workspace` must have.
int64_t moetor_workspace_bytes(const MoetorExperts* args);
// Computes `out`; returns a Status. On anything but kOk, `out` is untouched.
int moetor_experts(const MoetorExperts* args);
}
