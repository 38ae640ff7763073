// What stands around the experts, for AVX-512 with products of bfloat16 pairs: those of weights in bfloat16.
#include "vec_avx512_bf16.h"

#include "linear.h"

namespace {

int linear(const MoetorLinear& args, StartTeam start) {
  if (args.dtype == kBfloat16) return Linear<Avx512Bf16, Bf16>(args).run(start);
  return moetor_dense_avx512.linear(args, start);
}

}  // namespace

const DenseEntries moetor_dense_avx512_bf16 = {linear, nullptr, nullptr, nullptr};
