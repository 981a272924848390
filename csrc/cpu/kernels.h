// What a CPU kernel is given and who may call it: one table of function pointers per ISA, chosen
// once at start. Tasks are plain structs, checked by the op before any kernel sees them.
#pragma once
#include <stdint.h>

namespace hm {

// Sum of 64-bit words, as fast as memory delivers them: the yardstick for every other kernel.
struct ReadTask {
  const uint8_t* bytes;
  int64_t size;       // bytes
  uint64_t* sums;     // one per block
  int64_t block;      // bytes per block
};

struct Kernels {
  const char* name;
  void (*read_bytes)(const ReadTask&, int64_t begin, int64_t end);  // blocks
};

extern const Kernels kernels_generic, kernels_avx2, kernels_avx512, kernels_neon;

// The table in use: the best this machine runs, unless set_isa() chose another.
const Kernels& kernels();

}  // namespace hm
