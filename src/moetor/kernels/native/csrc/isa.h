// The entries of the instruction sets: one translation unit each, compiled with that set's flags.
#pragma once

#include "plan.h"

// Runs `work(data)` in a team of `threads`.
using StartTeam = void (*)(void (*work)(void*), void* data, int threads);

extern "C" {
int moetor_run_avx2(const MoetorExperts* args, const void* plan, StartTeam start);
int moetor_run_avx512(const MoetorExperts* args, const void* plan, StartTeam start);
int moetor_run_avx512_bf16(const MoetorExperts* args, const void* plan, StartTeam start);
}
