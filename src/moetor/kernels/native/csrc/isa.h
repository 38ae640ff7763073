// The entries of the instruction sets: one translation unit each, compiled with that set's flags.
#pragma once

#include "dense.h"
#include "plan.h"

extern "C" {
int moetor_run_avx2(const MoetorExperts* args, const void* plan, StartTeam start);
int moetor_run_avx512(const MoetorExperts* args, const void* plan, StartTeam start);
int moetor_run_avx512_bf16(const MoetorExperts* args, const void* plan, StartTeam start);
}
