// hadamard: in x[r,k] f32|bf16|f16, pre f32[p]?, post f32[q]?; out y[r,m] f32 or x's dtype;
// ints block. m = k rounded up to a multiple of block (x read as zero beyond k), or k when block = 0.
// pre and post repeat along the columns.
#include <vector>

#include "../core/contract.h"
#include "../core/pool.h"
#include "kernels.h"
#include "ops.h"

namespace hm {
namespace {

constexpr int64_t kLargest = 16384;
constexpr int64_t kGrain = 32768;  // elements a chunk: about 10 us, ten times the cost of a hand-over

// Signs a kernel can index by column modulo period without crossing its end inside a block.
struct Repeated {
  std::vector<float> storage;
  const float* values = nullptr;
  int64_t period = 1;

  Repeated(const DLTensor& t, int64_t block, int64_t columns) {
    if (!present(t)) return;
    values = reinterpret_cast<const float*>(data(t));
    period = t.shape[0];
    if (period == columns || (block && period % block == 0)) return;
    storage.resize(size_t(columns));
    for (int64_t i = 0; i < columns; ++i) storage[size_t(i)] = values[i % period];
    values = storage.data();
    period = columns;
  }
};

}  // namespace

const char* op_hadamard(const hm_args* args) {
  return guarded([&] {
    Contract c("hadamard");
    c.arity(*args, 3, false, 1, 1, 0);
    const DLTensor &x = args->in[0], &pre = args->in[1], &post = args->in[2], &y = args->out[0];
    const int64_t block = args->ints[0];
    c.shape("x", x, "rk").dtype("x", x, "f32 bf16 f16");
    c.require(block >= 0 && block <= kLargest && !(block & (block - 1)), "block",
              "is " + std::to_string(block) + ", needs 0 or a power of two up to " + std::to_string(kLargest));
    const int64_t k = c['k'], columns = block ? (k + block - 1) / block * block : k;
    c.require(block || k < 2 * kLargest, "x", "has k=" + std::to_string(k) + ", needs at most " +
              std::to_string(2 * kLargest - 1) + " where block is 0");
    c.bind("y", 'm', columns).shape("y", y, "rm");
    const std::string narrow = dtype_name(x.dtype);
    c.dtype("y", y, narrow == "f32" ? narrow : "f32 " + narrow);
    struct {
      const char* name;
      const DLTensor& t;
      char letter;
    } const signs[] = {{"pre", pre, 'p'}, {"post", post, 'q'}};
    for (const auto& [name, t, letter] : signs) {
      if (!present(t)) continue;
      c.shape(name, t, std::string_view(&letter, 1)).dtype(name, t, "f32");
      c.require(t.shape[0] > 0 && columns % t.shape[0] == 0, name,
                std::string("has ") + letter + "=" + std::to_string(t.shape[0]) + ", needs a divisor of " +
                    std::to_string(columns));
    }
    if (!c['r'] || !k) return;

    const Repeated before(pre, block, columns), after(post, block, columns);
    const HadamardTask task{data(x),       data(y),         storage(x), storage(y), k,
                            columns,       block,           before.values,    after.values,     before.period,
                            after.period};
    const int64_t unit = block ? block : k, units = c['r'] * (columns / unit);
    parallel_range(units, (kGrain + unit - 1) / unit,
                   [&](int64_t begin, int64_t end) { kernels().hadamard(task, begin, end); });
  });
}

}  // namespace hm
