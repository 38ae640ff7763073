// Reads memory as fast as the machine can, to find out how fast that is. Plain C++: no instruction set is assumed.
#include <stdint.h>

namespace {
constexpr int64_t kLine = 64;
constexpr int64_t kBlock = 4 * kLine;
}  // namespace

// Reads `bytes` bytes, one word of every cache line, as `streams` runs side by side, each fetching `ahead` bytes (0:
// none) in front of itself. Prefetching past the end is harmless. Returns the sum of the words, so that no read is
// optimised away.
extern "C" uint64_t moetor_read(const char* data, int64_t bytes, int64_t ahead, int streams) {
  uint64_t sums[4] = {0, 0, 0, 0};
  const int64_t run = bytes / streams / kBlock * kBlock;
  for (int64_t at = 0; at < run; at += kBlock) {
    for (int stream = 0; stream < streams; ++stream) {
      const char* block = data + stream * run + at;
      for (int line = 0; line < 4; ++line) {
        if (ahead > 0) __builtin_prefetch(block + ahead + line * kLine);
        sums[line] += *reinterpret_cast<const uint64_t*>(block + line * kLine);
      }
    }
  }
  return sums[0] + sums[1] + sums[2] + sums[3];
}
