#include "amx.h"

#if defined(__x86_64__)
#include <memory>
#include <new>

namespace hm {
namespace {

// Below this, tiles of 16 tokens are too empty.
constexpr int64_t kLeastTokens = 8;

struct Scratch {
  std::unique_ptr<char[]> memory;
  int64_t size = 0;
  // 64-byte aligned, or nullptr.
  char* get(int64_t bytes) {
    if (bytes > size) {
      memory.reset(new (std::nothrow) char[size_t(bytes) + 64]);
      size = memory ? bytes : 0;
    }
    return memory ? memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) : nullptr;
  }
};
thread_local Scratch scratch;

void qmatmul(const QmatmulTask& task, int64_t begin, int64_t end) {
  char* memory = nullptr;
  if (task.table != hm_plain && task.table != hm_codebook && task.token_count >= kLeastTokens)
    memory = scratch.get(amx_tiles(task.columns) * amx_tile_bytes(task.columns));
  memory ? amx_qmatmul(task, begin, end, memory) : kernels_avx512.qmatmul(task, begin, end);
}

Kernels make() {
  Kernels k = kernels_avx512;
  k.name = "amx";
  k.qmatmul = qmatmul;
  return k;
}

}  // namespace

const Kernels& kernels_amx() {
  static const Kernels table = make();
  return table;
}

}  // namespace hm
#endif
