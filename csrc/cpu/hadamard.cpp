// hadamard: in x[r,k] f32|bf16|f16, pre f32[p]?, post f32[q]?; out y[r,m] f32 or x's dtype;
// ints block. m = k rounded up to a multiple of block (x read as zero beyond k), or k when block = 0.
// pre and post repeat along the columns.
#include "../core/contract.h"
#include "../core/pool.h"
#include "kernels.h"
#include "ops.h"
#include "rotation.h"

namespace hm {

const char* op_hadamard(const hm_args* args) {
  return guarded([&] {
    constexpr int64_t kGrain = 32768;  // elements a chunk: about 10 us, ten times the cost of a hand-over
    constexpr RotationNames kNames{"x", "block", "pre", "post", "pq"};
    Contract c("hadamard");
    c.arity(*args, 3, false, 1, 1, 0);
    const DLTensor &x = args->in[0], &pre = args->in[1], &post = args->in[2], &y = args->out[0];
    const int64_t block = args->ints[0];
    c.shape("x", x, "rk").dtype("x", x, "f32 bf16 f16");
    const int64_t k = c['k'], columns = RowRotation::checked_columns(c, kNames, k, block);
    c.bind("y", 'm', columns).shape("y", y, "rm");
    const std::string narrow = dtype_name(x.dtype);
    c.dtype("y", y, narrow == "f32" ? narrow : "f32 " + narrow);
    RowRotation::check_signs(c, kNames, columns, pre, post);
    if (args->check || !c['r'] || !k) return;

    const RowRotation rotation(k, columns, block, pre, post);
    const HadamardTask task = rotation.task(data(x), storage(x), data(y), storage(y));
    const int64_t unit = rotation.unit();
    parallel_range(c['r'] * rotation.units_per_row(), (kGrain + unit - 1) / unit,
                   [&](int64_t begin, int64_t end) { kernels().hadamard(task, begin, end); });
  });
}

}  // namespace hm
