// What stands around the experts, for AVX2.
#include "vec_avx2.h"

#include "attend.h"
#include "linear.h"
#include "turn.h"

const DenseEntries moetor_dense_avx2 = {run_linear<Avx2>, run_norm<Avx2>, run_rotate<Avx2>, run_attention<Avx2>};
