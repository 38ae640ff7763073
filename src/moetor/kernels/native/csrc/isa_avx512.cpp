// The kernels for AVX-512.
#include "vec_avx512.h"

#include "isa.h"
#include "quantized.h"

int moetor_run_avx512(const MoetorExperts* args, const void* plan, StartTeam start) {
  return run_dtype<Avx512>(*args, *static_cast<const Plan*>(plan), start);
}
