// dequantize: in parts i64[e,p,12], rows i64[m] in [0, e * rows of an expert), buffers u8...;
// out y[m,k] f32|bf16|f16; ints columns = k. Rows come out as stored: a rotation is not undone.
#include "../core/contract.h"
#include "../core/parts.h"
#include "../core/pool.h"
#include "kernels.h"
#include "ops.h"

namespace hm {

const char* op_dequantize(const hm_args* args) {
  return guarded([&] {
    constexpr int64_t kGrain = 16384;  // numbers a chunk: about 10 us
    Contract c("dequantize");
    c.arity(*args, 2, true, 1, 1, 0);
    const DLTensor &rows = args->in[1], &y = args->out[0];
    const int64_t columns = args->ints[0];
    c.require(columns > 0, "columns", "is " + std::to_string(columns) + ", needs a positive number");
    c.bind("columns", 'k', columns);
    c.shape("rows", rows, "m").dtype("rows", rows, "i64");
    c.shape("y", y, "mk").dtype("y", y, "f32 bf16 f16");
    const Buffers buffers(c, *args, 2);
    const Parts weight(c, "parts", args->in[0], columns, buffers);
    if (args->check) return;
    const int64_t* index = reinterpret_cast<const int64_t*>(data(rows));
    const int64_t total = weight.experts * weight.rows;
    for (int64_t i = 0; i < c['m']; ++i)
      if (index[i] < 0 || index[i] >= total)
        c.fail("rows[" + std::to_string(i) + "]",
               "is " + std::to_string(index[i]) + ", needs 0.." + std::to_string(total - 1));

    const DequantizeTask task{weight.parts,        weight.per_expert, weight.rows, columns,
                              buffers.base.data(), index,             data(y),     storage(y)};
    parallel_range(c['m'], (kGrain + columns - 1) / columns,
                   [&](int64_t begin, int64_t end) { kernels().dequantize(task, begin, end); });
  });
}

}  // namespace hm
