// The kernels for AVX-512 with products of bfloat16 pairs and of bytes: what `paired` says.
#include "bytes_bf16.h"

#include "isa.h"
#include "quantized.h"

int moetor_run_avx512_bf16(const MoetorExperts* args, const void* plan, StartTeam start) {
  using Bytes = QuantizedExperts<Avx512Bf16, Bf16, kInt8Bytes>;
  const Plan& p = *static_cast<const Plan*>(plan);
  if (args->round_inputs) return run_experts<Bytes>(*args, p, start);
  return run_weights<Avx512Bf16, Bf16>(*args, p, start);
}
