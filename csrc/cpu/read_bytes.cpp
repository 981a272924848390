// read_bytes: in bytes u8[n]; out sums u64[b]; ints block. Reads every byte once, block by block.
#include "../core/contract.h"
#include "../core/pool.h"
#include "kernels.h"
#include "ops.h"

namespace hm {

const char* op_read_bytes(const hm_args* args) {
  return guarded([&] {
    Contract c("read_bytes");
    c.arity(*args, 1, false, 1, 1, 0);
    const DLTensor &bytes = args->in[0], &sums = args->out[0];
    int64_t block = args->ints[0];
    c.shape("bytes", bytes, "n").dtype("bytes", bytes, "u8");
    c.shape("sums", sums, "b").dtype("sums", sums, "u64");
    c.require(block > 0 && block % 64 == 0, "block", "is " + std::to_string(block) + ", needs a positive multiple of 64");
    c.bind("sums", 'b', (c['n'] + block - 1) / block);
    if (args->check) return;
    ReadTask task{reinterpret_cast<const uint8_t*>(data(bytes)), c['n'], reinterpret_cast<uint64_t*>(data(sums)), block};
    parallel_range(c['b'], 1, [&](int64_t begin, int64_t end) { kernels().read_bytes(task, begin, end); });
  });
}

}  // namespace hm
