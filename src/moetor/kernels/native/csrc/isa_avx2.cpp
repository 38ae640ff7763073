// The kernels for AVX2 with FMA and F16C.
#include "vec_avx2.h"

#include "isa.h"
#include "quantized.h"

int moetor_run_avx2(const MoetorExperts* args, const void* plan, StartTeam start) {
  return run_dtype<Avx2>(*args, *static_cast<const Plan*>(plan), start);
}
