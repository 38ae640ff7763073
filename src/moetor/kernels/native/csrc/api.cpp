// The C interface: what the processor can do, the workspace, and the call. Compiled for plain x86-64.
#include <cpuid.h>

#include "dense.h"
#include "isa.h"

extern "C" {
void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);
}

namespace {

// The register states that the operating system saves (XCR0).
uint64_t saved_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

int detect() {
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return kIsaNone;
  constexpr uint32_t kFma = 1u << 12, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  constexpr uint32_t kNeeded = kFma | kOsxsave | kAvx | kF16c;
  if ((ecx & kNeeded) != kNeeded) return kIsaNone;
  const uint64_t states = saved_states();
  if ((states & 0x6) != 0x6) return kIsaNone;  // XMM, YMM
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return kIsaNone;
  if (!(ebx & (1u << 5))) return kIsaNone;  // AVX2
  constexpr uint32_t kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  constexpr uint32_t kAvx512 = kF | kDq | kBw | kVl;
  if ((ebx & kAvx512) != kAvx512 || (states & 0xe6) != 0xe6) return kIsaAvx2;  // opmask, upper ZMM, ZMM16-31
  if (!(ecx & (1u << 11)) || eax < 1) return kIsaAvx512;  // VNNI; EAX: the last subleaf
  __cpuid_count(7, 1, eax, ebx, ecx, edx);
  return eax & (1u << 5) ? kIsaAvx512Bf16 : kIsaAvx512;
}

void start_team(void (*work)(void*), void* data, int threads) {
  GOMP_parallel(work, data, static_cast<unsigned>(threads < 1 ? 1 : threads), 0);
}

}  // namespace

int moetor_supports(int isa) {
  static int best = -1;
  if (best < 0) best = detect();  // threads that race here store the same number
  return isa > kIsaNone && isa <= best;
}

int64_t moetor_workspace_bytes(const MoetorExperts* args) { return make_plan(*args).bytes; }

int moetor_experts(const MoetorExperts* args) {
  if (!moetor_supports(args->isa)) return kBadIsa;
  Plan plan = make_plan(*args);
  if (plan.bytes > args->workspace_bytes) return kSmallWorkspace;
  if (!sort_slots(*args, plan)) return kBadExpertId;
  if (args->tokens == 0) return kOk;
  if (args->isa == kIsaAvx2) return moetor_run_avx2(args, &plan, start_team);
  if (paired(*args)) return moetor_run_avx512_bf16(args, &plan, start_team);
  return moetor_run_avx512(args, &plan, start_team);
}

namespace {

const DenseEntries& entries(int isa) { return isa == kIsaAvx2 ? moetor_dense_avx2 : moetor_dense_avx512; }

}  // namespace

int moetor_linear(const MoetorLinear* args) {
  if (!moetor_supports(args->isa)) return kBadIsa;
  const auto& own = args->isa == kIsaAvx512Bf16 ? moetor_dense_avx512_bf16 : entries(args->isa);
  return args->tokens == 0 ? kOk : own.linear(*args, start_team);
}

int moetor_norm(const MoetorNorm* args) {
  return moetor_supports(args->isa) ? entries(args->isa).norm(*args, start_team) : kBadIsa;
}

int moetor_rotate(const MoetorRotate* args) {
  return moetor_supports(args->isa) ? entries(args->isa).rotate(*args, start_team) : kBadIsa;
}

int moetor_attention(const MoetorAttention* args) {
  return moetor_supports(args->isa) ? entries(args->isa).attention(*args, start_team) : kBadIsa;
}
