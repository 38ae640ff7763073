// What stands around the experts, for AVX-512.
#include "vec_avx512.h"

#include "attend.h"
#include "linear.h"
#include "turn.h"

const DenseEntries moetor_dense_avx512 = {run_linear<Avx512>, run_norm<Avx512>, run_rotate<Avx512>,
                                          run_attention<Avx512>};
