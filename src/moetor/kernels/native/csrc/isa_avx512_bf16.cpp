// The kernels for AVX-512 with bfloat16 products: bfloat16 inputs alone.
#include "vec_avx512_bf16.h"

#include "isa.h"
#include "quantized.h"

int moetor_run_avx512_bf16(const MoetorExperts* args, const void* plan, StartTeam start) {
  return run_experts<Experts<Avx512Bf16, Bf16>>(*args, *static_cast<const Plan*>(plan), start);
}
